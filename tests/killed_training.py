"""Run by test_train.py: trains once undisturbed, then again under ten signals, and compares the weights.

The process that imports torch stays; its forked children train, are killed or interrupted, and train on.
"""

import os
import random
import sys
import time
from pathlib import Path

import torch
from torch import nn

import saehooks as sh

torch.set_num_threads(1)
SIGNALS = 10


def training(folder: Path, resume: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16)).eval()
    data = [torch.randint(0, 50, (16, 33)) for _ in range(120)]
    sae = sh.SAE(d_in=16, d_sae=64)
    settings = {"batch_size": 64, "buffer_rows": 2048, "checkpoint_every": 8, "progress": False}
    sh.fit(model, sae, data, "0", out=folder, resume=resume, **settings)


def child(folder: Path, resume: bool) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            training(folder, resume)
        except KeyboardInterrupt:
            os._exit(2)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def main(root: Path, number: int) -> None:
    training(root / "warm", False)  # compile the kernels once, here, for all children
    started = time.perf_counter()
    assert os.waitpid(child(root / "whole", False), 0)[1] == 0
    length = time.perf_counter() - started
    sent, draw = 0, random.Random(0)
    while sent < SIGNALS:
        pid = child(root / "cut", True)
        time.sleep(draw.uniform(0.01, 0.09) * length)
        if os.waitpid(pid, os.WNOHANG)[0]:
            break
        os.kill(pid, number)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 2, "the child failed of itself"
        sent += 1
    assert os.waitpid(child(root / "cut", True), 0)[1] == 0
    one, two = (sh.load(root / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(value, two[name]) for name, value in one.items()), "weights differ"
    print(f"{sent} signals, same weights")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
