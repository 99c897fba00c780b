"""The one place that chooses a path for a kernel: by device, unless a path is forced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import Tensor

from saehooks.errors import ConfigError
from saehooks.kernels import reference

PATHS = ("reference",)
_forced: str | None = os.environ.get("SAEHOOKS_KERNELS") or None


@contextmanager
def force(name: str) -> Iterator[None]:
    """Run the kernels of one path inside the block, whatever the device: ``with force("reference"): ...``.

    The environment variable ``SAEHOOKS_KERNELS`` does the same for a whole process.
    """
    global _forced
    if name not in PATHS:
        raise ConfigError(f"no kernel path {name!r}; choose one of {', '.join(PATHS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def path(tensor: Tensor) -> ModuleType:
    """The module whose kernels serve this tensor."""
    return reference
