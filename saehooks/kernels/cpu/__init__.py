"""The CPU backend: float32 in loops compiled by numba, shared by threads; the rest is the reference's."""

from saehooks.kernels.cpu.pairs import select_pair_products, select_pairs
from saehooks.kernels.cpu.products import refine, sddmm, sddmm_spmm, spmm, spmm_transposed, table_gradient
from saehooks.kernels.cpu.rows import directions, row_products, scaled_difference, scaled_gradient, squared_errors
from saehooks.kernels.cpu.screen import select_products
from saehooks.kernels.cpu.select import select_rows
from saehooks.kernels.cpu.weights import simplex_thresholds
from saehooks.kernels.memory import keep_freed
from saehooks.kernels.reference.adam import adam_step
from saehooks.kernels.reference.products import sum_by_latent
from saehooks.kernels.reference.weights import center, entmax_gradient, entmax_weights

NAME = "cpu"
ASYNCHRONOUS = False

keep_freed()

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
