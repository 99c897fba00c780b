"""Float64, in which sums are made and thresholds found; Apple's GPUs have none, and there float32 stands in for it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 for a device that has no float64."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") or _has_float64(device.type) else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """A tensor in the widest type of its device.

    >>> widened(torch.ones(2, dtype=torch.float16)).dtype
    torch.float64
    """
    return tensor.to(widest(tensor.device))


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64: on its own device, or on the CPU where that has none."""
    return tensor.double() if widest(tensor.device) == torch.float64 else tensor.cpu().double()


@cache
def _has_float64(device_type: str) -> bool:
    try:
        torch.empty(0, dtype=torch.float64, device=device_type)
    except (TypeError, RuntimeError):
        return False
    return True
