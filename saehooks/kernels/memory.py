"""Large CPU tensors whose memory is reused: touching fresh memory often costs more than computing in it."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from functools import cache

import numpy as np
import torch
from torch import Tensor

LARGE = 4 * 2**20
"""Bytes from which memory is kept, and from which numpy asks the system for huge pages."""

POOL_BYTES = 384 * 2**20
"""Most memory that is kept: the scores of a chunk, and gradients of tables between steps."""

ALIGNMENT = 64
"""Bytes; matrix products into a buffer that is not so aligned take a seventh longer."""

FREED_BYTES = 64 * 2**20
"""Most freed memory that the C library keeps at the end of its heap."""

MAPPED_BYTES = 32 * 2**20
"""Blocks from which on the C library asks the system for each, and gives it back; the most it raises this to itself."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""The names of these two for glibc's ``mallopt``."""

_pool: list[np.ndarray] = []
_lock = threading.Lock()


def _after_fork() -> None:
    """A lock that another thread held while the process forked is never given back in the child."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def reusable_empty(*shape: int) -> Tensor:
    """An uninitialised float32 CPU tensor of a shape; a large one reuses memory that is free again.

    It is no view of another tensor, so that autograd can add to it in place.
    """
    count = math.prod(shape)
    if 4 * count < LARGE:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    wanted = count + ALIGNMENT // 4
    with _lock:
        held = _take(wanted)
        start = -held.ctypes.data % ALIGNMENT // 4
        return torch.from_numpy(held[start : start + count].reshape(shape))


def _take(wanted: int) -> np.ndarray:
    """Memory for so many numbers that nothing else uses: kept, or new and then kept."""
    free = [i for i in range(len(_pool)) if _references(i) == 0]
    fitting = [i for i in free if wanted <= _pool[i].size <= 2 * wanted]
    if fitting:
        return _pool[min(fitting, key=lambda i: _pool[i].size)]
    for i in reversed(free):
        if sum(each.nbytes for each in _pool) + 4 * wanted <= POOL_BYTES:
            break
        del _pool[i]
    made = np.empty(wanted, np.float32)
    if sum(each.nbytes for each in _pool) + made.nbytes <= POOL_BYTES:
        _pool.append(made)
    return made


def _references(i: int) -> int:
    """Tensors that use the memory: whatever refers to the array but the pool and this call."""
    return sys.getrefcount(_pool[i]) - 2


def release() -> None:
    """Give back all memory that is kept and not in use."""
    with _lock:
        _pool[:] = [_pool[i] for i in range(len(_pool)) if _references(i) > 0]
    library = _c_library()
    if library is not None:
        library.malloc_trim(0)


@cache
def keep_freed() -> bool:
    """Let glibc keep some freed memory, once for this process; says whether it was done.

    A training step allocates and frees tensors of a few megabytes, torch's too. glibc gives the end of its heap back
    to the system when twice such a tensor is free there, and touches it anew in the next step: thousands of page
    faults, 5 to 10% of a small step. Whoever has set glibc's own variables (``MALLOC_TRIM_THRESHOLD_`` and its kin)
    has decided; nothing is changed then, nor with another C library.
    """
    decided = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    library = None if decided else _c_library()
    if library is None:
        return False
    # Setting either stops glibc from adapting both.
    return bool(library.mallopt(_MMAP_THRESHOLD, MAPPED_BYTES) and library.mallopt(_TRIM_THRESHOLD, FREED_BYTES))


@cache
def _c_library() -> ctypes.CDLL | None:
    """glibc, if that is the C library of this process."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    needed = ("gnu_get_libc_version", "mallopt", "malloc_trim")
    return library if all(hasattr(library, name) for name in needed) else None
