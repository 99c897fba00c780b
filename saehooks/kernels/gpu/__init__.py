"""The GPU backend: Triton kernels. Scores, sums and thresholds are float32, whatever the inputs.

Float64 and rules without a kernel go to the reference.
"""

from __future__ import annotations

import torch

from saehooks.errors import ConfigError
from saehooks.kernels.gpu.adam import adam_step
from saehooks.kernels.gpu.launch import LEAST_CAPABILITY
from saehooks.kernels.gpu.products import (
    refine,
    sddmm,
    sddmm_spmm,
    spmm,
    spmm_transposed,
    sum_by_latent,
    table_gradient,
)
from saehooks.kernels.gpu.scores import select_products
from saehooks.kernels.gpu.select import select_rows
from saehooks.kernels.gpu.weights import center, entmax_gradient, entmax_weights
from saehooks.kernels.reference.pairs import select_pair_products, select_pairs
from saehooks.kernels.reference.rows import directions, row_products, scaled_difference, scaled_gradient, squared_errors
from saehooks.kernels.reference.weights import simplex_thresholds
from saehooks.kernels.rules import Sparsemax

NAME = "gpu"
ASYNCHRONOUS = True

__all__ = [
    "ASYNCHRONOUS",
    "NAME",
    "adam_step",
    "center",
    "directions",
    "entmax_gradient",
    "entmax_weights",
    "probe",
    "refine",
    "row_products",
    "scaled_difference",
    "scaled_gradient",
    "sddmm",
    "sddmm_spmm",
    "select_pair_products",
    "select_pairs",
    "select_products",
    "select_rows",
    "simplex_thresholds",
    "spmm",
    "spmm_transposed",
    "squared_errors",
    "sum_by_latent",
    "table_gradient",
]


def probe(device: torch.device) -> None:
    """Run a small selection on a GPU; raises whatever keeps the kernels from running there."""
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise ConfigError(f"compute capability {capability}, the kernels need {LEAST_CAPABILITY}")
    found = select_rows(torch.eye(2, dtype=torch.float32, device=device) * 4, Sparsemax())
    if found.indices.tolist() != [0, 1]:
        raise ConfigError(f"a selection gave {found.indices.tolist()} instead of [0, 1]")
