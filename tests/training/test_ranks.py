"""Several processes train one SAE as one process would: split by rows, by latents, and by both."""

import os
import subprocess
import sys

import pytest
import ranks_child as child
import torch
from ranks_child import GRIDS

import saehooks as sh
from saehooks.cli import main
from saehooks.errors import ConfigError
from saehooks.ranks import Alone, Ranks, shard
from saehooks.ranks.splitting import check_splits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and gloo over the loopback device"),
]
TOLERANCE = 1e-4
"""Of losses, relative: sums of float32 in another order, over all steps. Measured: 2e-7."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where one process, and then ranks that are its forks, have trained."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, child.__file__, str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone(root):
    """What one process kept."""
    return torch.load(root / "alone.0")


@pytest.fixture(scope="module")
def together(root):
    """What every rank kept, by grid."""
    return {name: [torch.load(root / f"{name}.{rank}") for rank in range(GRIDS[name]["ranks"])] for name in GRIDS}


def close(one, other):
    """Whether two trainings had the same losses and ended with the same weights."""
    for before, after in zip(one["history"], other["history"], strict=True):
        assert before.keys() == after.keys()
        for column in before:
            # What is counted may change by a latent whose score lies on the threshold.
            loose = (
                0.02 * before[column] + 0.6 if column.split("_")[-1] in ("l0", "dead", "q05", "q95", "median") else 0
            )
            assert after[column] == pytest.approx(before[column], rel=TOLERANCE, abs=1e-7 + loose), column
    for name, value in one["state"].items():
        got = other["state"][name]
        assert got.shape == value.shape
        if value.is_floating_point():
            assert (got - value).abs().max() <= 1e-3 * value.abs().max() + 1e-6, name
        elif name.startswith("density"):
            assert (got - value).abs().max() <= 2, name


@pytest.mark.parametrize("grid", GRIDS)
def test_ranks_train_as_one_process(alone, together, grid):
    """Losses, held-out figures, counts and weights of every cell are those of one process, on every rank."""
    for made in together[grid]:
        for name in (*GRIDS[grid]["cells"], "model"):
            close(alone[name], made[name])
    for name, term in (("topk, dead latents", "loss_aux_k"), ("mutual choice", "loss_aux_zipf")):
        assert any(term in record for record in alone[name]["history"])
    assert together["latents"][0]["model"]["rows"] == alone["model"]["rows"]


@pytest.mark.parametrize("grid", ["rows", "latents"])
def test_several_saes_train_together_on_several_ranks(alone, together, grid):
    """From the same forwards, at two sites, stopped and gone on with: each as by one process."""
    for made in together[grid]:
        for name, wanted in alone["several"].items():
            close(wanted, made["several"][name])


def test_counts_that_are_halved_are_those_of_one_process(monkeypatch):
    """Densities halve their counts after a million rows, also where each rank has a part of the rows."""
    from saehooks.activations import LatentDensity
    from saehooks.ranks.activations import ShardedDensity

    one, of_two = (kind(4, track_density=True) for kind in (LatentDensity, ShardedDensity))

    class Two(Ranks):
        data = 2

        def __init__(self):
            pass

        def over_rows(self, tensor):
            return 2 * tensor  # the other rank counted the same

    of_two.ranks = Two()
    for _ in range(3):
        one.update(torch.tensor([400_000, 2, 0, 7]), 400_000)
        of_two.update(torch.tensor([200_000, 1, 0, 3]), 200_000)
    assert int(of_two.rows) == int(one.rows) == 600_000
    assert of_two.fired.tolist() == [600_000, 3, 0, 9]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_first_rank_writes_one_ordinary_folder(alone, together, root, grid):
    """Whatever the grid, the SAE that was saved is the whole one."""
    saved = sh.load(root / f"sae {grid}").state_dict()
    whole = together[grid][0]["model"]["state"]
    assert all(torch.equal(saved[name], value) for name, value in whole.items())


def test_bytes_sent_in_a_step_are_the_arithmetic(together):
    """Candidates, reconstruction and queries' gradient of the rows; split by rows alone, the gradients. No more."""
    rows, d_in, d_sae, k, flag = 32, 16, 64, 4, 4
    split = rows * k * 4 + 2 * rows * d_in * 4 + flag
    gradients = (2 * d_sae * d_in + d_sae + d_in) * 4
    statistics = 8 * d_sae + 8 * d_sae  # how often latents fired, and since when they did not
    assert {made["bytes"] for made in together["latents"]} == {split}
    assert {made["bytes"] for made in together["rows"]} == {gradients + statistics + flag}


@pytest.mark.parametrize("made_by", ["use", "use split"])
def test_an_sae_split_over_ranks_is_used_as_any(together, root, made_by):
    """Blocks, edits of latents of any rank, `measure`, gradients and directions are those of one process."""
    alone = child.use(sh.load(root / "sae four"))
    for made in together["latents"]:
        for name, value in alone.items():
            got = made[made_by][name]
            if isinstance(value, dict):
                assert got == pytest.approx(value, rel=1e-4, abs=1e-6)
            else:
                torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)
    assert alone["gradient of codes"].any(dim=0).sum() > 20


@pytest.mark.parametrize("grid", ["rows", "latents"])
def test_every_rank_is_told_what_is_wrong(together, grid):
    """Ranks that disagree, and what only one of them meets: one error, on every rank, naming the rank it is of."""
    ours, theirs = "ConfigError: ", "ConfigError: on rank 1: "
    disagree = "ConfigError: the ranks disagree"
    expected = {
        "another rate": ((disagree, disagree), "lr"),
        "another SAE": ((disagree, disagree), "'k': 4"),
        "other activations": ((disagree, disagree), "content of the batches"),
        "fewer activations": ((disagree, disagree), "batches"),
        "several": ((disagree, disagree), "SAEs: "),
        "too few": ((ours, ours), "20 activations do not fill a batch of 32"),
        "no such setting": (("UnknownKeywordError: on rank 1: ", "UnknownKeywordError: "), "learning_rate="),
        "frozen": ((theirs, ours), "all parameters of the SAE are frozen"),
        "no column": ((theirs, ours), "no column 'text'; it has words"),
        "tokenizer": ((theirs, ours), "the largest token is 99, which the model does not know"),
        "altered": (("FormatError: on rank 1: ", "FormatError: "), "were altered after they were written"),
        "on_record": (("OSError: ", "OSError: [Errno 28] on rank 0: "), "No space left on device"),
    }
    for rank, made in enumerate(together[grid]):
        for name, (beginnings, part) in expected.items():
            told = made["wrong"][name]
            assert told.startswith(beginnings[rank]), (name, told)
            assert part in told, (name, told)
        if grid == "latents":
            assert "latent_ranks: ['1', '2']" in made["wrong"]["another split"]


@pytest.mark.parametrize("grid", ["rows", "latents"])
def test_a_full_disk_of_one_rank_is_said_by_all_and_loses_nothing(together, grid):
    """The last checkpoint stays, nothing half-written does; with room again the training ends as an undisturbed one."""
    victim = int(grid == "latents")
    for rank, made in enumerate(together[grid]):
        found = made["full disk"]
        assert found["told"].startswith("StorageError: step 20 could not be saved"), found
        assert "File too large" in found["told"], found
        assert ("on rank" in found["told"]) == (rank != victim), found
        assert found["left"] == ["checkpoint.safetensors"]
        assert found["same"]
        assert found["steps"][0] == found["steps"][1]


def test_torchrun_runs_the_command_as_it_is(root, tmp_path):
    """Two processes, latents split: the folder they leave is the one that the same command alone leaves."""
    command = ["-m", "saehooks", "fit", "--activations", str(root / "acts 0"), "--d-sae", "64", "--steps", "12"]
    command += ["--batch-size", "64", "--buffer-rows", "256", "--log-every", "2", "--k", "4", "--activation", "topk"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = [*torchrun, *command, "--latent-ranks", "2", "--out", str(tmp_path / "both")]
    done = subprocess.run(both, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote ") == 1, "the first process alone says what was made"
    assert main([*command[2:], "--out", str(tmp_path / "one")]) == 0
    wanted, found = (sh.load(tmp_path / name).state_dict() for name in ("one", "both"))
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("grid", "before"), [(name, before) for name, grid in GRIDS.items() for before in grid["from"]]
)
def test_a_checkpoint_goes_on_with_another_number_of_ranks(alone, together, grid, before):
    """Written by one, two or four processes, and read by another number of them, or split in another way."""
    for made in together[grid]:
        close(alone["24 steps"], made[f"from {before}"])


@pytest.mark.parametrize("before", ["c2", "c4"])
def test_one_process_goes_on_from_the_checkpoint_of_several(alone, together, root, before):
    """What several wrote is the file that one would have written."""
    close(alone["24 steps"], child.go_on(root / before / "made", 5, 24, {}))


def test_what_cannot_be_split_is_refused():
    """Without torchrun, or where latents cannot be shared evenly, the error says so before anything runs."""
    with pytest.raises(ConfigError, match="torchrun"):
        sh.fit(child.rows(), child.fresh("topk"), latent_ranks=2, **child.training("topk", 5))

    class Two(Ranks):
        latents, latent_rank, size, data = 2, 0, 2, 1

        def __init__(self):
            pass

    assert shard(sh.SAE(16, 64), Two()).d_sae == 32
    assert shard(sh.SAE(16, 16), Two()).dictionary.C.shape == (8, 16)
    for sae, said in (
        (sh.SAE(16, 48, "kron", "topk", k=4, m=4, n=4), "3 heads cannot be split evenly .* multiple of 32"),
        (sh.SAE(16, 65), "65 latents cannot be split evenly .* multiple of 2"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_splits(sae.cfg, Two())
        assert shard(sae, Alone()) is sae
