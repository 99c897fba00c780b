"""Host side of the sparse products on the GPU: sorting by column, launches, no waiting."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from saehooks.codes import rows_of
from saehooks.kernels import reference
from saehooks.kernels import triton_products as kernels
from saehooks.kernels.copies import shared_copy
from saehooks.kernels.gpu_launch import on
from saehooks.kernels.gpu_plan import product_plan
from saehooks.kernels.remember import remembered

SEGMENT = 256
"""Entries of a column that one program sums; longer columns are cut."""


class Columns(NamedTuple):
    """Entries of compressed rows sorted by column and, inside a column, by row; long columns cut into segments."""

    starts: Tensor
    """(d_sae + 1,) int64, where each column starts."""
    rows: Tensor
    """(nnz,) int64, the row of each entry."""
    places: Tensor
    """(nnz,) int64, where the entry stands in the compressed rows."""
    extras: Tensor
    """(d_sae + 1,) int64, segments after the first of all columns before."""
    owners: Tensor
    """(room for segments,) int64, the column of each segment after the first."""


@remembered
def columns(indices: Tensor, offsets: Tensor, d_sae: int) -> Columns:
    """Sort a support by column; remembered for as long as the ``indices`` tensor lives and is not changed."""
    nnz = indices.numel()
    # Padding past the last row sorts behind every column.
    keys = torch.where(torch.arange(nnz, device=indices.device) < offsets[-1], indices, d_sae).int()
    ordered, places = keys.sort(stable=True)
    bounds = torch.arange(d_sae + 1, device=indices.device, dtype=torch.int32)
    starts = torch.searchsorted(ordered, bounds)
    more = (starts.diff() - 1).div(SEGMENT, rounding_mode="floor").clamp(min=0)
    extras = torch.cat([more.new_zeros(1), more.cumsum(0)])
    segments = torch.arange(nnz // SEGMENT, device=indices.device)
    owners = torch.searchsorted(extras[1:], segments, right=True)
    return Columns(starts, rows_of(offsets, nnz)[places], places, extras, owners)


def sddmm(left: Tensor, table: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    """(nnz,) products ``left[row] . table[index]``; 0 for padding past the last row."""
    if torch.float64 in (left.dtype, table.dtype):
        return reference.sddmm(left, table, indices, offsets)
    left, table = _rowwise(left), _rowwise(shared_copy(table))
    out = left.new_zeros(indices.numel())
    plan = product_plan(left.shape[1])
    with on(left, table, indices, offsets):
        if not (out.numel() and left.shape[0]):
            return out
        kernels.sddmm[(left.shape[0],)](
            left, left.stride(0), table, table.stride(0), indices, offsets, out, left.shape[1],
            WIDTH=plan.width, ENTRIES=plan.entries, num_warps=plan.warps,
        )  # fmt: skip
    return out


def spmm(values: Tensor, indices: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """(rows, d) sums ``values @ table[indices]`` of each compressed row."""
    if table.dtype == torch.float64:
        return reference.spmm(values, indices, offsets, table)
    rows, width = offsets.numel() - 1, table.shape[1]
    out = table.new_empty(rows, width)
    values, table = values.contiguous(), _rowwise(shared_copy(table))
    plan = product_plan(width)
    with on(values, indices, offsets, table):
        if not out.numel():
            return out
        kernels.spmm[(rows, plan.blocks)](
            values, indices, offsets, table, table.stride(0), out, width,
            WIDTH=plan.width, ENTRIES=plan.entries, num_warps=plan.warps,
        )  # fmt: skip
    return out


class ColumnSum(NamedTuple):
    """One contribution to a table's gradient: its long columns' segments summed, the rest still to be."""

    values: Tensor
    columns: Columns
    parts: Tensor
    left: Tensor


def column_sum(values: Tensor, indices: Tensor, offsets: Tensor, left: Tensor, d_sae: int) -> ColumnSum:
    """Sort by column and sum the segments of long columns."""
    values, left = values.contiguous(), _rowwise(left)
    sorted_by_column = columns(indices, offsets, d_sae)
    segments, width = sorted_by_column.owners.numel(), left.shape[1]
    parts = left.new_empty(segments, width, dtype=torch.float32)
    plan = product_plan(width)
    if segments and width:
        starts, rows, places, extras, owners = sorted_by_column
        kernels.spmm_segments[(segments, plan.blocks)](
            values, places, rows, starts, extras, owners, parts, left, left.stride(0), d_sae, width,
            SEGMENT=SEGMENT, WIDTH=plan.width, ENTRIES=plan.entries, num_warps=plan.warps,
        )  # fmt: skip
    return ColumnSum(values, sorted_by_column, parts, left)


def spmm_transposed(values: Tensor, indices: Tensor, offsets: Tensor, left: Tensor, d_sae: int) -> Tensor:
    """(d_sae, d) gradient of a table: row ``i`` sums ``value * left[row]`` over the entries with index ``i``."""
    if left.dtype == torch.float64:
        return reference.spmm_transposed(values, indices, offsets, left, d_sae)
    with on(values, indices, offsets, left):
        found = column_sum(values, indices, offsets, left, d_sae)
        out = left.new_empty(d_sae, left.shape[1])
        plan = product_plan(left.shape[1])
        if out.numel():
            launch: dict[str, Any] = {"WIDTH": plan.width, "ENTRIES": plan.column_entries, "num_warps": plan.warps}
            kernels.spmm_columns[(d_sae, plan.blocks)](*arguments(found), out, left.shape[1], SEGMENT=SEGMENT, **launch)
    return out


def arguments(found: ColumnSum) -> tuple[Any, ...]:
    """A contribution as the kernels take it."""
    starts, rows, places, extras, _ = found.columns
    return found.values, places, rows, starts, extras, found.parts, found.left, found.left.stride(0)


def center(values: Tensor, offsets: Tensor, total: float) -> Tensor:
    """(nnz,) values shifted by a constant in each row, so that the row sums to ``total``; 0 for padding."""
    values = values.contiguous()
    out = torch.zeros_like(values)
    with on(values, offsets):
        if out.numel() and offsets.numel() > 1:
            kernels.center[(offsets.numel() - 1,)](values, offsets, out, total, ENTRIES=128, num_warps=1)
    return out


def _rowwise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 and tensor.stride(1) == 1 else tensor.contiguous()
