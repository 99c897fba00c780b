"""Several processes train one SAE as one process would: split by rows, by latents, and by both."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import ranks_child as child
import torch

import saehooks as sh
from saehooks.errors import ConfigError
from saehooks.ranks import Alone, Ranks, shard
from saehooks.ranks.splitting import check_splits

pytestmark = pytest.mark.slow
STEPS = 12
TOLERANCE = 1e-4
"""Of losses, relative: sums of float32 in another order, over all steps. Measured: 2e-7."""
FEW = ["sparsemax", "jumprelu", "batchtopk", "feature choice"]
GRIDS = {
    "four": {"ranks": 4, "latents": 4, "cells": FEW[:1], "from": ["c1"], "checkpoint": "c4"},
    "latents": {
        "ranks": 2,
        "latents": 2,
        "cells": FEW,
        "from": ["c1", "c4"],
        "checkpoint": "c2",
        "wrong": True,
        "use": "sae four",
    },
    "both": {"ranks": 4, "latents": 2, "cells": list(child.CELLS), "from": ["c2"]},
    "rows": {"ranks": 2, "latents": 1, "cells": FEW, "from": ["c4"], "wrong": True},
}
"""In this order: later ones go on from checkpoints of earlier ones."""


def torchrun(name, folder):
    """What each rank of a real torchrun kept."""
    grid = GRIDS[name]
    for before in grid["from"]:
        shutil.copytree(folder / before / "made", folder / before / name)
    task = {**grid, "name": name, "folder": str(folder), "steps": STEPS, "save": f"sae {name}"}
    if "checkpoint" in grid:
        task["checkpoint"] = f"{grid['checkpoint']}/made"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    # --standalone: the operating system picks a free port.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(grid["ranks"])]
    command = [sys.executable, *launcher, child.__file__, json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{name}.{rank}") for rank in range(grid["ranks"])]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def alone(root):
    """One process: all cells, and a checkpoint to go on from."""
    made = child.train_cells(list(child.CELLS), STEPS, 0, {})
    made["model"] = child.train_on_a_model(root / "alone", 0, {})
    child.go_on(root / "c1" / "made", 0, 12, {})
    shutil.copytree(root / "c1" / "made", root / "kept")
    made["24 steps"] = child.go_on(root / "kept", 0, 24, {})
    return made


@pytest.fixture(scope="module")
def together(alone, root):
    """The same by several processes."""
    return {name: torchrun(name, root) for name in GRIDS}


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
    """Ranks that disagree, data that differ, end early, cannot be read or are too few: one error, on every rank."""
    expected = {
        "another rate": ("ConfigError: the ranks disagree", "lr"),
        "another SAE": ("ConfigError: the ranks disagree", "'k': 4"),
        "other activations": ("ConfigError: the ranks disagree", "content of the batches"),
        "fewer activations": ("ConfigError: the ranks disagree", "batches"),
        "unreadable": ("FormatError: ", "shard-000001.safetensors was cut short"),
        "too few": ("ConfigError: 20 activations do not fill a batch of 32",),
    }
    for rank, made in enumerate(together[grid]):
        for name, parts in expected.items():
            assert all(part in made["wrong"][name] for part in parts), (name, made["wrong"][name])
        assert ("on rank 1" in made["wrong"]["unreadable"]) == (rank == 0)
        if grid == "latents":
            assert "latent_ranks: ['1', '2']" in made["wrong"]["another split"]


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
