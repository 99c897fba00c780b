"""Compiled models inside a block of hooks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncompiled() -> Iterator[None]:
    """Models that went through ``torch.compile`` run eagerly inside the block, and compiled again after it.

    Compiled code neither sees hooks that were added after it was made, nor forgets those it was made with.
    """
    compiler = sys.modules.get("torch._dynamo") and sys.modules.get("torch.compiler")
    if not compiler or not hasattr(compiler, "set_stance"):  # nothing was compiled, or torch is older than 2.6
        yield
        return
    with compiler.set_stance("force_eager"):
        yield
