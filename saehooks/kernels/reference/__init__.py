"""The reference backend: every operation in plain torch, on any device and dtype."""

from saehooks.kernels.reference.adam import adam_step
from saehooks.kernels.reference.pairs import select_pair_products, select_pairs
from saehooks.kernels.reference.products import (
    refine,
    sddmm,
    sddmm_spmm,
    spmm,
    spmm_transposed,
    sum_by_latent,
    table_gradient,
)
from saehooks.kernels.reference.rows import directions, row_products, scaled_difference, scaled_gradient, squared_errors
from saehooks.kernels.reference.select import select_products, select_rows
from saehooks.kernels.reference.weights import center, entmax_gradient, entmax_weights, simplex_thresholds

NAME = "reference"
ASYNCHRONOUS = False

__all__ = [
    "ASYNCHRONOUS",
    "NAME",
    "adam_step",
    "center",
    "directions",
    "entmax_gradient",
    "entmax_weights",
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
