"""The GPU path: Triton kernels behind the interface of the reference path.

Scores, sums and thresholds are float32, whatever the inputs; float64 and rules without a kernel go to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saehooks.errors import ConfigError
from saehooks.kernels import reference
from saehooks.kernels.gpu_entmax import entmax_gradient, entmax_weights
from saehooks.kernels.gpu_launch import LEAST_CAPABILITY
from saehooks.kernels.gpu_products import center, sddmm, spmm, spmm_transposed
from saehooks.kernels.gpu_scores import select_products
from saehooks.kernels.gpu_select import describe, select_scores
from saehooks.kernels.rules import RowRule, Sparsemax, Support

__all__ = [
    "center",
    "entmax_gradient",
    "entmax_weights",
    "probe",
    "sddmm",
    "select",
    "select_products",
    "spmm",
    "spmm_transposed",
]


def select(scores: Tensor, rule: RowRule) -> Support:
    """Select from given scores (rows, d_sae) by a row rule."""
    described = describe(rule, scores.shape[1], scores.device)
    if described is None or scores.dtype == torch.float64 or not scores.numel():
        return reference.select(scores, rule)
    return select_scores([scores], described)[0]


def probe(device: torch.device) -> None:
    """Run a small selection on a GPU; raises whatever keeps the kernels from running there."""
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise ConfigError(f"compute capability {capability}, the kernels need {LEAST_CAPABILITY}")
    found = select(torch.eye(2, device=device) * 4, Sparsemax())
    if found.indices.tolist() != [0, 1]:
        raise ConfigError(f"a selection gave {found.indices.tolist()} instead of [0, 1]")
