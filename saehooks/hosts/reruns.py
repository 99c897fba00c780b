"""Forwards that run a user's call once more: they are edited like it, and neither recorded nor trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_RERUN: ContextVar[bool] = ContextVar("saehooks_rerun", default=False)
"""Whether the forward that this thread runs is such a one."""


def is_rerun() -> bool:
    """Whether the forward that runs now is one that a `measure` block adds to the user's own."""
    return _RERUN.get()


@contextmanager
def rerunning(model: nn.Module) -> Iterator[None]:
    """A forward in the block leaves nothing behind: no gradient, no random number drawn, no statistics updated."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    token = _RERUN.set(True)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng(devices=devices))
            stack.enter_context(_kept_buffers(model))
            yield
    finally:
        _RERUN.reset(token)


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers of modules in train mode, such as the statistics of a batch norm, are put back after the block."""
    training = [module for module in model.modules() if module.training]
    before = [
        (module, name, buffer, buffer.clone())
        for module in training
        for name, buffer in module._buffers.items()
        if isinstance(buffer, Tensor)
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in before:
            if not torch.equal(buffer, value):
                buffer.copy_(value)
            module._buffers[name] = buffer
