"""Compiled models inside a block of hooks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _EagerBlocks:
    """The blocks that are open now: the first one sets the stance of torch.compile, the last one sets it back."""

    def __init__(self) -> None:
        self._open, self._lock = 0, threading.Lock()
        self._stance: Any = None

    def enter(self) -> None:
        with self._lock:
            if not self._open:
                self._stance = torch.compiler.set_stance("force_eager")
            self._open += 1

    def leave(self) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                self._stance.__exit__(None, None, None)


_EAGER = _EagerBlocks()
"""The stance belongs to the process, so what counts its users does too."""


@contextmanager
def uncompiled() -> Iterator[None]:
    """Models that went through ``torch.compile`` run eagerly inside the block, and compiled again after it.

    Compiled code neither sees hooks that were added after it was made, nor forgets those it was made with. Blocks may
    be left in any order, and a model may be compiled for the first time inside one.
    """
    if not hasattr(torch.compiler, "set_stance"):  # torch before 2.6
        yield
        return
    _EAGER.enter()
    try:
        yield
    finally:
        _EAGER.leave()
