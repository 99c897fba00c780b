"""Models whose parameters ask for no gradient, for the length of a block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

KEY = "_saehooks_frozen"
"""The entry of a frozen model's ``__dict__``: which parameters asked for a gradient, and how many blocks run."""

_LOCK = threading.Lock()
"""Held while a block begins or ends, so that threads that share a model count each other."""


class _Frozen:
    def __init__(self, model: nn.Module):
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.blocks = 0

    def __deepcopy__(self, memo: object) -> None:
        """A copy of the model belongs to no block."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block no parameter of the model asks for a gradient, so that a backward pass costs less.

    Blocks on one model may end in any order, in any thread: the last one restores the flags.
    """
    with _LOCK:
        shared = model.__dict__.get(KEY) or _Frozen(model)
        shared.blocks += 1
        model.__dict__[KEY] = shared
        for p in shared.trainable:
            p.requires_grad_(False)
    try:
        yield
    finally:
        with _LOCK:
            shared.blocks -= 1
            if not shared.blocks:
                del model.__dict__[KEY]
                for p in shared.trainable:
                    p.requires_grad_(True)
