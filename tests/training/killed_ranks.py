"""Run by test_killed_ranks.py: trains with two ranks again and again, of which one kills itself where it is told to."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from forked import run_ranks

import saehooks as sh

MOMENTS = {"reduce": (dist, "all_reduce"), "fsync": (os, "fsync"), "replace": (os, "replace")}


def die_at(module: object, name: str, count: int) -> None:
    """SIGKILL to this process at its count-th call of a function."""
    called, before = [], getattr(module, name)

    def counted(*args: object, **kwargs: object) -> object:
        called.append(1)
        if len(called) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*args, **kwargs)

    setattr(module, name, counted)


def train(rank: int, out: Path, kill: dict, latent_ranks: int = 2) -> None:
    """One rank's part of a training that goes on from what is there."""
    if rank == kill.get("victim"):
        die_at(*MOMENTS[kill["moment"]], kill["count"])
    torch.manual_seed(rank)
    sae = sh.SAE(16, 64, "linear", "topk", k=4)
    rows = list(torch.randn(2000, 16, generator=torch.Generator().manual_seed(1)).split(40))
    settings = {"batch_size": 32, "buffer_rows": 128, "warmup_steps": 2, "steps": 20, "checkpoint_every": 4}
    sh.fit(rows, sae, out=out, resume=True, latent_ranks=latent_ranks, progress=False, **settings)


def run(folder: Path, number: int, out: str, kill: dict) -> dict:
    """Exit status and what was said, of both ranks."""
    statuses, said = run_ranks(2, lambda rank: train(rank, folder / out, kill), folder, number)
    return {"statuses": statuses, "said": said}


def main(folder: Path, kills: list[dict]) -> None:
    train(0, folder / "alone", {}, 1)  # loads what is compiled at its first use: forks have it then
    found = [run(folder, 0, "whole", {})]
    for number, kill in enumerate([*kills, {}], 1):
        found.append(run(folder, number, "killed", kill))
        checkpoint = folder / "killed" / "checkpoint.safetensors"
        if checkpoint.exists():
            shutil.copy(checkpoint, folder / f"checkpoint.{number}")
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
