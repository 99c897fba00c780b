"""Ranks as forks of a process that has imported everything and started no thread: each costs next to nothing."""

import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

torch.set_num_threads(1)
os.environ["GLOO_SOCKET_IFNAME"] = "lo"


def run_ranks(size, work, folder, name):
    """Exit status and what was said of every rank, of which each calls ``work(rank)`` in a group of ``size``.

    Args:
        folder: for what the ranks say, and the file by which they find each other.
        name: of these ranks, given once.
    """
    said = [Path(folder, f"said.{name}.{rank}") for rank in range(size)]
    processes = []
    for rank in range(size):
        process = os.fork()
        if not process:
            status = 1
            try:
                os.dup2(os.open(said[rank], os.O_WRONLY | os.O_CREAT), 2)
                dist.init_process_group("gloo", init_method=f"file://{folder}/store.{name}", rank=rank, world_size=size)
                work(rank)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        processes.append(process)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    return statuses, [file.read_text() for file in said]
