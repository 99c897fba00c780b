"""Refuse what makes the host wait for a GPU, also where there is none to wait for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}
"""Operations whose result, or its size, the host has to know."""


class _Refuse(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple) else ()
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or by_mask or unsized:
            raise RuntimeError(f"{func} makes the host wait for the GPU")
        return func(*args, **kwargs)


@contextmanager
def never(device: torch.device | str) -> Iterator[None]:
    """Inside the block, an operation that would make the host wait for a GPU raises RuntimeError."""
    if torch.device(device).type != "cuda":
        with _Refuse():
            yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
