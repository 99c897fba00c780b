"""Blocks of rows over threads, for kernels that release the interpreter lock.

The threads are torch's own OpenMP team where that is GNU's. It spins for milliseconds after each product: threads
beside it would wait for the processors it holds, while work given to the team itself starts at once. Elsewhere, and
after a fork, which an OpenMP team does not survive, they are Python threads that sleep when idle.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

GRAIN = 2**19
"""Scores or products that are worth a thread of their own: some 0.2 ms of work."""

BLOCKS_PER_THREAD = 6
"""Blocks are handed out as threads become free; more of them balance better and cost more calls."""

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_forked = False

_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _after_fork() -> None:
    global _pool, _pool_size, _forked
    _pool, _pool_size, _forked = None, 0, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@cache
def _openmp() -> Any:
    """GNU's OpenMP as torch has loaded it, or None."""
    root = Path(torch.__file__).parent
    for file in sorted([*root.glob("lib/libgomp*.so*"), *root.parent.glob("torch.libs/libgomp*.so*")]):
        try:
            library = ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            library.GOMP_parallel.argtypes = (_Region, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            library.GOMP_parallel.restype = None
            library.omp_in_parallel.restype = ctypes.c_int
        except (OSError, AttributeError):
            continue
        return library
    return None


def _executor(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    if _pool is None or _pool_size < size:
        _pool, _pool_size = ThreadPoolExecutor(size, thread_name_prefix="saehooks"), size
    return _pool


def blocks(total: int, grain: int) -> list[tuple[int, int]]:
    """Consecutive (start, stop) ranges that cover ``range(total)``, about equally long, as many for each thread.

    None is much shorter than ``grain``: less than two grains are one range, which is done sooner than shared out.
    """
    threads = torch.get_num_threads()
    pieces = max(1, min(BLOCKS_PER_THREAD * threads, total // max(1, grain)))
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

    def drain(_: Any = None) -> None:
        try:
            while not errors:
                try:
                    place, (start, stop) = waiting.popleft()
                except IndexError:
                    return
                results[place] = work(start, stop)
        except BaseException as error:
            errors.append(error)

    openmp = None if _forked else _openmp()
    if openmp is not None and not openmp.omp_in_parallel():
        openmp.GOMP_parallel(_Region(drain), None, threads, 0)
    else:
        _on_python_threads(drain, threads)
    if errors:
        raise errors[0]
    return [results[place] for place in range(len(ranges))]


def _on_python_threads(drain: Callable[[], None], threads: int) -> None:
    helpers = [_executor(threads - 1).submit(drain) for _ in range(threads - 1)]
    drain()
    for helper in helpers:
        # One that a busy pool never started has nothing left to do.
        if not helper.cancel():
            helper.result()
