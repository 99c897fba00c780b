"""Work that is killed or interrupted ten times at random moments, and called again each time; run by test_faults.py.

    python killed.py FOLDER SIGNAL

The process that imports torch stays; its forked children work, die, and work on. In the end the folder holds what an
undisturbed call leaves. A clock that goes backwards all the time makes no difference: each child has one.
"""

import itertools
import os
import random
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import saehooks as sh
from saehooks.latents import collect

torch.set_num_threads(1)
SIGNALS = 10


def parts(batches: int) -> tuple[nn.Module, list[torch.Tensor], sh.SAE]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16)).eval()
    data = [torch.randint(0, 50, (16, 33)) for _ in range(batches)]
    return model, data, sh.SAE(d_in=16, d_sae=64, hook_name="0")


def train(folder: Path, again: bool) -> None:
    model, data, sae = parts(60)
    settings = {"batch_size": 64, "buffer_rows": 2048, "checkpoint_every": 8, "progress": False}
    sh.fit(model, sae, data, "0", out=folder, resume=again, **settings)


def harvest(folder: Path, again: bool) -> None:
    model, data, _ = parts(150)
    sh.harvest(model, data, "0", to=folder, shard_bytes=50_000)


def survey(folder: Path, again: bool) -> None:
    model, data, sae = parts(60)
    going_on = again and (folder / "survey.safetensors").exists()
    with mock.patch.object(collect, "SAVE_EVERY", 0.0):  # after each batch
        sh.survey(model, sae, data, folder=folder, resume=going_on, progress=False)


def save(folder: Path, again: bool) -> None:
    """One SAE, then another over it, and so on; the last is the other."""
    torch.manual_seed(0)
    pair = [sh.SAE(d_in=64, d_sae=512) for _ in range(2)]
    if again and (folder / "cfg.json").exists():  # whatever was killed, one of the two is there
        found = sh.load(folder).state_dict()
        assert any(all(torch.equal(value, one.state_dict()[name]) for name, value in found.items()) for one in pair)
    for _ in range(20):
        for one in pair:
            one.save(folder)


JOBS = {"train": train, "harvest": harvest, "survey": survey, "save": save}


def child(job: str, folder: Path, again: bool) -> int:
    pid = os.fork()
    if pid == 0:
        backwards = itertools.count(time.time(), -1000.0)
        try:
            with mock.patch.object(time, "time", side_effect=backwards):
                JOBS[job](folder, again)
        except KeyboardInterrupt:
            os._exit(2)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def contents(folder: Path) -> dict[str, bytes]:
    """What a folder holds. Of a training its SAE: the record of its seconds differs."""
    names = {file.name: file for file in sorted(folder.iterdir()) if file.name != ".lock"}
    assert not [name for name in names if name.startswith(".")], f"left behind: {sorted(names)}"
    if "checkpoint.safetensors" in names:
        weights = sh.load(folder).state_dict()
        return {name: value.numpy().tobytes() for name, value in weights.items()}
    return {name: file.read_bytes() for name, file in names.items()}


def main(job: str, root: Path, number: int) -> None:
    JOBS[job](root / "warm", False)  # compile the kernels once, here, for all children
    started = time.perf_counter()
    assert os.waitpid(child(job, root / "whole", False), 0)[1] == 0
    length = time.perf_counter() - started
    sent, draw = 0, random.Random(0)
    while sent < SIGNALS:
        pid = child(job, root / "cut", True)
        time.sleep(draw.uniform(0.01, 0.25) * length)
        os.kill(pid, number)  # one that has ended already is not waited for yet
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) in (0, 2), f"{job}: the child failed of itself"
        sent += 1
    assert os.waitpid(child(job, root / "cut", True), 0)[1] == 0
    assert contents(root / "cut") == contents(root / "whole"), f"{job}: other files"


if __name__ == "__main__":
    for name in JOBS:
        main(name, Path(sys.argv[1], name), int(sys.argv[2]))
        print(f"{name}: the same files", flush=True)
