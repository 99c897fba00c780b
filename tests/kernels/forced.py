"""Runs a block as if the environment named a backend, with what needs no step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from saehooks.kernels import backend


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Inside the block the kernels of one backend serve all tensors; on every thread, so for tests only."""
    before, backend.FORCED = backend.FORCED, name
    try:
        yield
    finally:
        backend.FORCED = before
