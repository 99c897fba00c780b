"""The sparse products in plain torch: any device, any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saehooks.kernels.step import DEFAULT, Contribution, Step
from saehooks.precision import widest
from saehooks.support import Support

CHUNK_BYTES = 64 * 2**20
"""Most memory a temporary of gathered rows may take."""


def sddmm(left: Tensor, table: Tensor, support: Support, step: Step = DEFAULT) -> Tensor:
    """(nnz,) products ``left[row] . table[index]`` of the entries; left (rows, d), table (d_sae, d)."""
    rows, indices = support.rows, support.indices
    out = left.new_empty(indices.numel())
    chunk = _entries(left)
    for start in range(0, indices.numel(), chunk):
        part = slice(start, start + chunk)
        torch.sum(left[rows[part]] * table[indices[part]], dim=1, out=out[part])
    return out


def spmm(values: Tensor, support: Support, table: Tensor, step: Step = DEFAULT) -> Tensor:
    """(rows, d) sums ``values @ table[indices]`` of each row; values (nnz,), table (d_sae, d)."""
    if not support.indices.numel():
        return table.new_zeros(support.n_rows, table.shape[1])
    return F.embedding_bag(
        support.indices,
        table,
        support.offsets,
        mode="sum",
        per_sample_weights=values.to(table.dtype),
        include_last_offset=True,
    )


def sddmm_spmm(
    left: Tensor, table: Tensor, support: Support, values: Tensor | None, rate: Tensor | None, step: Step = DEFAULT
) -> tuple[Tensor, Tensor]:
    """(nnz,) ``values + rate * sddmm(left, table)``, and (rows, d) the sums `spmm` of these."""
    moved = moved_by(values, rate, sddmm(left, table, support))
    return moved, spmm(moved, support, table)


def moved_by(values: Tensor | None, rate: Tensor | None, change: Tensor) -> Tensor:
    """(nnz,) ``values + rate * change``; no values count as 0, no rate as 1."""
    change = change if rate is None else rate * change
    return change if values is None else values + change


def refine(
    target: Tensor, table: Tensor, support: Support, values: Tensor, rate: Tensor, step: Step = DEFAULT
) -> Tensor:
    """(nnz,) ``values + rate * sddmm(target - spmm(values, table), table)``; target (rows, d), rate ()."""
    return moved_by(values, rate, sddmm(target - spmm(values, support, table), table, support))


def spmm_transposed(values: Tensor, support: Support, left: Tensor, d_sae: int) -> Tensor:
    """(d_sae, d) gradient of a table: row ``i`` sums ``value * left[row]`` over the entries with index ``i``."""
    rows, indices = support.rows, support.indices
    out = left.new_zeros(d_sae, left.shape[1])
    chunk = _entries(left)
    for start in range(0, indices.numel(), chunk):
        part = slice(start, start + chunk)
        out.index_add_(0, indices[part], left[rows[part]] * values[part, None].to(left.dtype))
    return out


def table_gradient(parts: list[Contribution], d_sae: int) -> Tensor:
    """(d_sae, d) the sum of one or more `spmm_transposed`, in new memory."""
    out = spmm_transposed(*parts[0], d_sae)
    for part in parts[1:]:
        out += spmm_transposed(*part, d_sae)
    return out


def sum_by_latent(values: Tensor, support: Support, d_sae: int) -> Tensor:
    """(d_sae,) sums of the values (nnz,) of each latent, always in the same order."""
    if values.device.type == "cpu":
        return values.new_zeros(d_sae).index_add_(0, support.indices, values)
    if widest(values.device) != torch.float64:  # differences of running sums need it
        own = torch.zeros(d_sae, dtype=values.dtype, device="cpu")
        return own.index_add_(0, support.indices.cpu(), values.cpu()).to(values.device)
    # index_add_ on a GPU adds in any order; sorted by latent there is one.
    by_latent, order = support.indices.sort(stable=True)
    ends = torch.searchsorted(by_latent, torch.arange(d_sae + 1, device=values.device))
    sums = torch.cat([values.new_zeros(1, dtype=torch.float64), values[order].double().cumsum(0)])
    return (sums[ends[1:]] - sums[ends[:-1]]).to(values.dtype)


def _entries(left: Tensor) -> int:
    return max(1, CHUNK_BYTES // max(1, left.shape[1] * left.element_size()))
