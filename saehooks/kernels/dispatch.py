"""The one place that chooses a path for a kernel: by device, unless a path is forced."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from saehooks.errors import ConfigError
from saehooks.kernels import reference
from saehooks.kernels.rules import RowRule, Support

PATHS = ("reference", "cpu", "gpu")
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
    """The module whose kernels serve this tensor: the forced one, else the fastest for its device and dtype."""
    name = path_name(tensor)
    return reference if name == "reference" else import_module(f"saehooks.kernels.{name}")


def path_name(tensor: Tensor) -> str:
    """Which of `PATHS` serves this tensor."""
    name = _forced or _fastest(tensor)
    if name not in PATHS:
        raise ConfigError(f"no kernel path {name!r}; choose one of {', '.join(PATHS)}")
    return name


def _fastest(tensor: Tensor) -> str:
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32 and _has_numba():
        return "cpu"
    if tensor.device.type == "cuda" and tensor.dtype != torch.float64 and _has_kernels(tensor.device):
        return "gpu"
    return "reference"


@cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


@cache
def _has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run on this GPU; if not, warns, once, that plain torch serves it."""
    try:
        import_module("saehooks.kernels.gpu").probe(device)
    except Exception as error:  # whatever keeps them from running (no Triton, no C compiler, an old GPU): torch runs
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        warnings.warn(
            f"the Triton kernels do not run on {device} ({reason}); saehooks uses plain torch there, which gives the "
            "same results more slowly",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def select_rows(scores: Tensor, rule: RowRule) -> Support:
    """Select from given scores (rows, d_sae); a path passes rules it does not know on to the reference."""
    return path(scores).select(scores, rule)
