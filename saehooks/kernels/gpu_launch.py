"""What every launch needs: tensors on one device, and that device the current one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from saehooks.errors import ConfigError

LEAST_CAPABILITY = (8, 0)
"""The oldest GPUs that the kernels are compiled for in the tests."""


def on(*tensors: Tensor) -> AbstractContextManager:
    """Make the tensors' device the current one; CPU tensors need Triton's interpreter.

    Raises:
        ConfigError: tensors on different devices, or on a device that has no kernels.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise ConfigError(
            f"the tensors of one operation live on {names}: move them to one device, codes.to(device) say"
        )
    device = devices.pop()
    if device.type == "cuda":
        return torch.cuda.device(device)
    if not triton.knobs.runtime.interpret:
        raise ConfigError(
            f"the gpu path cannot run on {device.type} tensors; set TRITON_INTERPRET=1 before saehooks is imported "
            "to run its kernels in Triton's interpreter"
        )
    return nullcontext()
