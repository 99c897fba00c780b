"""Finds what would make the host wait for a GPU, also where there is none to wait for."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "equal")
"""Operations whose result, or its size, the host has to know."""


class Waits(TorchDispatchMode):
    """Notes where the host would wait for the device: ``waits.found`` lists operations and lines of saehooks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple) else ()
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or by_mask or unsized:
            frames = [frame for frame in traceback.extract_stack() if "/saehooks/" in frame.filename]
            self.found.append(f"{name} at {frames[-1].filename}:{frames[-1].lineno}" if frames else name)
        return func(*args, **kwargs)


@contextmanager
def never(device: torch.device | str) -> Iterator[None]:
    """Raises RuntimeError if anything in the block made, or would have made, the host wait for a GPU."""
    if torch.device(device).type != "cuda":
        with Waits() as waits:
            yield
        if waits.found:
            raise RuntimeError(f"the host waits for the GPU: {'; '.join(waits.found)}")
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
