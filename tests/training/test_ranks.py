"""Several processes train one SAE as one process would: split by rows, by latents, and by both."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_child as child
import torch

import saehooks as sh
from saehooks.errors import ConfigError
from saehooks.training.ranks import Alone, Ranks

pytestmark = pytest.mark.slow
STEPS = 25
TOLERANCE = 2e-4
"""Of losses, relative: sums of float32 in another order, over all steps. Measured: below 1e-5."""
GRIDS = {"rows": (2, 1), "latents": (2, 2), "both": (4, 2)}
PORT = 29500 + os.getpid() % 400


def torchrun(ranks, folder, latents, names, number=0):
    """What each rank of a real torchrun kept."""
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(PORT + number)]
    command = [
        sys.executable,
        *launcher,
        child.__file__,
        str(folder / "made"),
        str(latents),
        str(STEPS),
        ";".join(names),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{folder / 'made'}.{rank}") for rank in range(ranks)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def alone(root):
    """One process: all cells, and a checkpoint to go on from."""
    made = child.train_cells(list(child.CELLS), STEPS, 0, {})
    made["model"] = child.train_on_a_model(root / "alone", 0, {})
    child.go_on(root / "checkpoint of one", 0, 12, {})
    shutil.copytree(root / "checkpoint of one", root / "kept")
    made["24 steps"] = child.go_on(root / "kept", 0, 24, {})
    return made


@pytest.fixture(scope="module")
def together(alone, root):
    """The same by several processes."""
    made = {}
    for number, (name, (ranks, latents)) in enumerate(GRIDS.items()):
        cells = list(child.CELLS) if name == "latents" else ["sparsemax", "jumprelu"]
        made[name] = torchrun(ranks, root / name, latents, cells, number)
    return made


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


@pytest.mark.parametrize("grid", GRIDS)
def test_ranks_train_as_one_process(alone, together, grid):
    """Losses, held-out figures and weights of every cell are those of one process, on every rank."""
    for made in together[grid]:
        for name in made:
            if name in alone:
                close(alone[name], made[name])
    assert "loss_aux_k" in alone["topk, dead latents"]["history"][-2]
    assert together["latents"][0]["model"]["rows"] == alone["model"]["rows"]


def test_the_first_rank_writes_one_ordinary_folder(alone, together, root):
    """Whatever the grid, the SAE that was saved is the whole one."""
    for grid in GRIDS:
        saved = sh.load(root / grid / "sae").state_dict()
        whole = together[grid][0]["model"]["state"]
        assert all(torch.equal(saved[name], value) for name, value in whole.items())


def test_bytes_sent_in_a_step_are_the_arithmetic(together):
    """Candidates, reconstruction and queries' gradient of the rows; split by rows alone, the gradients. No more."""
    rows, d_in, d_sae, k, flag = 32, 16, 64, 4, 4
    split = rows * k * 4 + 2 * rows * d_in * 4 + flag
    gradients = (2 * d_sae * d_in + d_sae + d_in) * 4
    statistics = 8 * d_sae + 8 + 8 * d_sae  # how often latents fired, of how many rows, and since when they did not
    assert {made["bytes"] for made in together["latents"]} == {split}
    assert {made["bytes"] for made in together["rows"]} == {gradients + statistics + flag}


def test_ranks_that_disagree_are_told_so(together):
    """Every rank gets the error that names the setting, instead of a wrong training or one that hangs."""
    for ranks in together.values():
        for made in ranks:
            assert "the ranks disagree" in made["disagree"]
            assert "lr" in made["disagree"]


def test_a_checkpoint_goes_on_with_another_number_of_ranks(alone, together, root):
    """Written by one process and read by two or four, and the other way round."""
    for grid in ("latents", "both"):
        close(alone["24 steps"], together[grid][0]["from one"])
        close(alone["24 steps"], child.go_on(root / grid / "checkpoint of several", 5, 24, {}))


def test_what_cannot_be_split_is_refused():
    """Without torchrun, or for a cell whose latents look at each other, the error says so before anything runs."""
    with pytest.raises(ConfigError, match="torchrun"):
        sh.fit(child.rows(), child.fresh("topk"), latent_ranks=2, **child.training("topk", 5))

    class Two(Ranks):
        def __init__(self):
            self.latents, self.latent_rank, self._axes = 2, 0, {}

    assert Two().shard(sh.SAE(16, 64)).d_sae == 32
    for sae, said in (
        (sh.SAE(16, 64, "kron", "topk", k=4, m=4, n=4), "'kron' cannot be split"),
        (sh.SAE(16, 64, values="weight"), "values='weight'"),
        (sh.SAE(16, 65), "65 latents cannot be split evenly"),
    ):
        with pytest.raises(ConfigError, match=said):
            Two().shard(sae)
    assert Alone().shard(sae) is sae
    assert Path(child.__file__).is_file()
