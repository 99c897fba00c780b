"""Blocks of rows over threads, for kernels that release the interpreter lock.

The threads are torch's own OpenMP team where that is GNU's. It spins for milliseconds after each product: threads
beside it would wait for the processors it holds, while work given to the team itself starts at once. Elsewhere, and
after a fork, which an OpenMP team does not survive, they are Python threads that sleep when idle.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

GRAIN = 2**19
"""Scores or products that are worth a thread of their own: some 0.2 ms of work."""

BLOCKS_PER_THREAD = 6
"""Blocks are handed out as threads become free; more of them balance better and cost more calls."""

_jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
_helpers = 0
"""Python threads that take jobs from a queue of C's: an executor's locks may stay shut when a signal handler raises."""
_forked = False

_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _after_fork() -> None:
    global _jobs, _helpers, _forked
    _jobs, _helpers, _forked = SimpleQueue(), 0, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@cache
def _openmp() -> Any:
    """GNU's OpenMP as torch has loaded it, or None."""
    root = Path(torch.__file__).parent
    for file in sorted([*root.glob("lib/libgomp*.so*"), *root.parent.glob("torch.libs/libgomp*.so*")]):
        try:
            library = ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            library.GOMP_parallel_start.argtypes = (_Region, ctypes.c_void_p, ctypes.c_uint)
            library.GOMP_parallel_start.restype = library.GOMP_parallel_end.restype = None
            library.omp_in_parallel.restype = ctypes.c_int
        except (OSError, AttributeError):
            continue
        return library
    return None


def blocks(total: int, grain: int, per_thread: int = BLOCKS_PER_THREAD) -> list[tuple[int, int]]:
    """Consecutive (start, stop) ranges that cover ``range(total)``, about equally long, as many for each thread.

    None is much shorter than ``grain``: less than two grains are one range, which is done sooner than shared out.
    """
    threads = torch.get_num_threads()
    pieces = max(1, min(per_thread * threads, total // max(1, grain)))
    if pieces > threads:
        pieces -= pieces % threads
    step = max(1, -(-total // pieces))
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def spread(work: Callable[[int, int], Result], ranges: list[tuple[int, int]]) -> list[Result]:
    """``[work(start, stop) for start, stop in ranges]`` on as many threads as torch uses, the caller's among them."""
    threads = min(torch.get_num_threads(), len(ranges))
    if threads <= 1:
        return [work(start, stop) for start, stop in ranges]
    results: dict[int, Result] = {}
    errors: list[BaseException] = []
    waiting = deque(enumerate(ranges))
    ended: SimpleQueue[None] = SimpleQueue()

    def drain(_: Any = None) -> None:
        while not errors:
            try:
                place, (start, stop) = waiting.popleft()
            except IndexError:
                return
            try:
                results[place] = work(start, stop)
            except BaseException as error:
                errors.append(error)
            ended.put(None)

    openmp = None if _forked else _openmp()
    if openmp is not None and not openmp.omp_in_parallel():
        _on_openmp_team(openmp, drain, threads)
    else:
        _help_with(drain, threads - 1)
        drain()
        while len(results) < len(ranges) and not errors:
            ended.get()
    if errors:
        raise errors[0]
    return [results[place] for place in range(len(ranges))]


def _on_openmp_team(openmp: Any, drain: Callable[[], None], threads: int) -> None:
    """The team's other threads are started, and this one works beside them as plain Python, not in a callback of C's.

    What a signal handler raises here would be lost in a callback. It is raised as anywhere, once the others are done.
    """
    region = _Region(drain)  # kept until the region has ended
    try:
        openmp.GOMP_parallel_start(region, None, threads)
        drain()
    finally:
        openmp.GOMP_parallel_end()


def _help_with(job: Callable[[], None], count: int) -> None:
    """Give a job to so many helpers; those that are busy find later that nothing is left of it."""
    global _helpers
    while _helpers < count:
        threading.Thread(target=_take_jobs, args=(_jobs,), name="saehooks", daemon=True).start()
        _helpers += 1
    for _ in range(count):
        _jobs.put(job)


def _take_jobs(jobs: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        jobs.get()()
