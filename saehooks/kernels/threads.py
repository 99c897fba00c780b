"""Blocks of rows over threads, for kernels that release the interpreter lock.

Python threads that sleep when idle, rather than an OpenMP pool: they do not spin against torch's own threads, survive
a fork, and may be called from several threads at once.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

BLOCKS_PER_THREAD = 6
"""Blocks are handed out as threads become free; more of them balance better and cost more calls."""

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _forget_pool() -> None:
    global _pool, _pool_size
    _pool, _pool_size = None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _executor(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    if _pool is None or _pool_size < size:
        _pool, _pool_size = ThreadPoolExecutor(size, thread_name_prefix="saehooks"), size
    return _pool


def blocks(total: int, grain: int) -> list[tuple[int, int]]:
    """Consecutive (start, stop) ranges that cover ``range(total)``, each at least ``grain`` long but the last."""
    step = max(grain, -(-total // (BLOCKS_PER_THREAD * torch.get_num_threads())), 1)
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def spread(work: Callable[[int, int], Result], ranges: list[tuple[int, int]]) -> list[Result]:
    """``[work(start, stop) for start, stop in ranges]`` on as many threads as torch uses, the caller's among them."""
    threads = min(torch.get_num_threads(), len(ranges))
    if threads <= 1:
        return [work(start, stop) for start, stop in ranges]
    results: dict[int, Result] = {}
    waiting = deque(enumerate(ranges))

    def drain() -> None:
        while True:
            try:
                place, (start, stop) = waiting.popleft()
            except IndexError:
                return
            results[place] = work(start, stop)

    helpers = [_executor(threads - 1).submit(drain) for _ in range(threads - 1)]
    try:
        drain()
    finally:
        waiting.clear()
        for helper in helpers:
            # One that a busy pool never started has nothing left to do.
            if not helper.cancel():
                helper.result()
    return [results[place] for place in range(len(ranges))]
