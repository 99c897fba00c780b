"""Run by test_killed_ranks.py: trains with two ranks again and again, of which one kills itself where it is told to.

Ranks are forks of this process, which has imported everything and started no thread: each costs next to nothing.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

import saehooks as sh

torch.set_num_threads(1)
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
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


def train(rank: int, store: Path, out: Path, kill: dict) -> None:
    """One rank's part of a training that goes on from what is there."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    if rank == kill.get("victim"):
        die_at(*MOMENTS[kill["moment"]], kill["count"])
    torch.manual_seed(rank)
    sae = sh.SAE(16, 64, "linear", "topk", k=4)
    rows = list(torch.randn(2000, 16, generator=torch.Generator().manual_seed(1)).split(40))
    settings = {"batch_size": 32, "buffer_rows": 128, "warmup_steps": 2, "steps": 20, "checkpoint_every": 4}
    sh.fit(rows, sae, out=out, resume=True, latent_ranks=2, progress=False, **settings)


def run(folder: Path, number: int, out: str, kill: dict) -> dict:
    """Exit status and what was said, of both ranks."""
    said = [folder / f"said.{number}.{rank}" for rank in range(2)]
    processes = []
    for rank in range(2):
        process = os.fork()
        if not process:
            status = 1
            try:
                os.dup2(os.open(said[rank], os.O_WRONLY | os.O_CREAT), 2)
                train(rank, folder / f"store.{number}", folder / out, kill)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        processes.append(process)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    return {"statuses": statuses, "said": [file.read_text() for file in said]}


def main(folder: Path, kills: list[dict]) -> None:
    found = [run(folder, 0, "whole", {})]
    for number, kill in enumerate([*kills, {}], 1):
        found.append(run(folder, number, "killed", kill))
        checkpoint = folder / "killed" / "checkpoint.safetensors"
        if checkpoint.exists():
            shutil.copy(checkpoint, folder / f"checkpoint.{number}")
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
