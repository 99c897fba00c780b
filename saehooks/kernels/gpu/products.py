"""Triton kernels of the sparse products. No atomics: every sum has one owner and one order.

A program of `sddmm` or `spmm` owns a row (and for `spmm` a block of its width). A program of `spmm_columns` owns a
column of the support, sorted by column beforehand; a column longer than SEGMENT entries is cut into segments, whose
sums `spmm_segments` makes first and the column's owner adds up in order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saehooks.kernels import reference
from saehooks.kernels.gpu.launch import on, product_plan
from saehooks.kernels.reference.products import moved_by
from saehooks.kernels.step import DEFAULT, Contribution, Step
from saehooks.support import Support, rows_of

SEGMENT = 256
"""Entries of a column that one program sums; longer columns are cut."""


class ByLatent(NamedTuple):
    """Entries of compressed rows sorted by latent and, inside a latent, by row; long columns cut into segments."""

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


def sort_by_latent(indices: Tensor, offsets: Tensor, d_sae: int) -> ByLatent:
    """The index of a support (nnz,), (rows + 1,) by latent; `Support.by_latent` keeps it."""
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
    return ByLatent(starts, rows_of(offsets, nnz)[places], places, extras, owners)


def sddmm(left: Tensor, table: Tensor, support: Support, step: Step = DEFAULT) -> Tensor:
    """(nnz,) products ``left[row] . table[index]``; 0 for padding past the last row."""
    if torch.float64 in (left.dtype, table.dtype):
        return reference.sddmm(left, table, support)
    left, table = _rowwise(left), _rowwise(step.table(table))
    indices, offsets = support.indices, support.offsets
    out = left.new_zeros(indices.numel())
    plan = product_plan(left.shape[1])
    with on(left, table, indices, offsets):
        if not (out.numel() and left.shape[0]):
            return out
        sddmm_kernel[(left.shape[0],)](
            left, left.stride(0), table, table.stride(0), indices, offsets, out, left.shape[1],
            WIDTH=plan.width, ENTRIES=plan.entries, num_warps=plan.warps,
        )  # fmt: skip
    return out


def spmm(values: Tensor, support: Support, table: Tensor, step: Step = DEFAULT) -> Tensor:
    """(rows, d) sums ``values @ table[indices]`` of each compressed row."""
    if table.dtype == torch.float64:
        return reference.spmm(values, support, table)
    indices, offsets = support.indices, support.offsets
    rows, width = support.n_rows, table.shape[1]
    out = table.new_empty(rows, width)
    values, table = values.contiguous(), _rowwise(step.table(table))
    plan = product_plan(width)
    with on(values, indices, offsets, table):
        if not out.numel():
            return out
        spmm_kernel[(rows, plan.blocks)](
            values, indices, offsets, table, table.stride(0), out, width,
            WIDTH=plan.width, ENTRIES=plan.entries, num_warps=plan.warps,
        )  # fmt: skip
    return out


def sddmm_spmm(
    left: Tensor, table: Tensor, support: Support, values: Tensor | None, rate: Tensor | None, step: Step = DEFAULT
) -> tuple[Tensor, Tensor]:
    """(nnz,) ``values + rate * sddmm(left, table)``, and (rows, d) the sums `spmm` of these."""
    moved = moved_by(values, rate, sddmm(left, table, support, step))
    return moved, spmm(moved, support, table, step)


def refine(
    target: Tensor, table: Tensor, support: Support, values: Tensor, rate: Tensor, step: Step = DEFAULT
) -> Tensor:
    """(nnz,) ``values + rate * sddmm(target - spmm(values, table), table)``; target (rows, d), rate ()."""
    missed = target - spmm(values, support, table, step)
    return moved_by(values, rate, sddmm(missed, table, support, step))


class ColumnSum(NamedTuple):
    """One contribution to a table's gradient: its long columns' segments summed, the rest still to be."""

    values: Tensor
    by_latent: ByLatent
    parts: Tensor
    left: Tensor


def column_sum(values: Tensor, support: Support, left: Tensor, d_sae: int) -> ColumnSum:
    """Sort values (nnz,) by column and sum the segments of long columns, of ``left`` (rows, d)."""
    values, left = values.contiguous(), _rowwise(left)
    by_latent = support.by_latent(sort_by_latent, d_sae)
    segments, width = by_latent.owners.numel(), left.shape[1]
    parts = left.new_empty(segments, width, dtype=torch.float32)
    plan = product_plan(width)
    if segments and width:
        starts, rows, places, extras, owners = by_latent
        spmm_segments_kernel[(segments, plan.blocks)](
            values, places, rows, starts, extras, owners, parts, left, left.stride(0), d_sae, width,
            SEGMENT=SEGMENT, WIDTH=plan.width, ENTRIES=plan.entries, num_warps=plan.warps,
        )  # fmt: skip
    return ColumnSum(values, by_latent, parts, left)


def spmm_transposed(values: Tensor, support: Support, left: Tensor, d_sae: int) -> Tensor:
    """(d_sae, d) gradient of a table: row ``i`` sums ``value * left[row]`` over the entries with index ``i``."""
    if left.dtype == torch.float64:
        return reference.spmm_transposed(values, support, left, d_sae)
    with on(values, support.indices, support.offsets, left):
        found = column_sum(values, support, left, d_sae)
        out = left.new_empty(d_sae, left.shape[1])
        plan = product_plan(left.shape[1])
        if out.numel():
            launch: dict[str, Any] = {"WIDTH": plan.width, "ENTRIES": plan.column_entries, "num_warps": plan.warps}
            spmm_columns_kernel[(d_sae, plan.blocks)](*arguments(found), out, left.shape[1], SEGMENT=SEGMENT, **launch)
    return out


def table_gradient(parts: list[Contribution], d_sae: int) -> Tensor:
    """(d_sae, d) the sum of one or more `spmm_transposed`, in new memory."""
    out = spmm_transposed(*parts[0], d_sae)
    for part in parts[1:]:
        out += spmm_transposed(*part, d_sae)
    return out


def sum_by_latent(values: Tensor, support: Support, d_sae: int) -> Tensor:
    """(d_sae,) sums of the values (nnz,) of each latent, always in the same order."""
    ones = values.new_ones(support.n_rows, 1)
    return spmm_transposed(values, support, ones, d_sae)[:, 0]


def arguments(found: ColumnSum) -> tuple[Any, ...]:
    """A contribution as the kernels take it."""
    starts, rows, places, extras, _ = found.by_latent
    return found.values, places, rows, starts, extras, found.parts, found.left, found.left.stride(0)


def _rowwise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 and tensor.stride(1) == 1 else tensor.contiguous()


# ---------------------------------------------------------------- Triton kernels


@triton.jit
def sddmm_kernel(
    LEFT,
    left_stride,
    TABLE,
    table_stride,
    INDICES,
    OFFSETS,
    OUT,
    width,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """``OUT[e] = LEFT[row] . TABLE[INDICES[e]]`` for the entries of one row."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(OFFSETS + row)
    stop = tl.load(OFFSETS + row + 1)
    lane = tl.arange(0, WIDTH)
    for first in range(start, stop, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        real = entry < stop
        latent = tl.load(INDICES + entry, mask=real, other=0)
        sums = tl.zeros((ENTRIES, WIDTH), tl.float32)
        for begin in range(0, width, WIDTH):
            inside = begin + lane < width
            left = tl.load(LEFT + row * left_stride + begin + lane, mask=inside, other=0.0).to(tl.float32)
            place = latent[:, None] * table_stride + (begin + lane)[None, :]
            table = tl.load(TABLE + place, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
            sums += table * left[None, :]
        tl.store(OUT + entry, tl.sum(sums, 1).to(OUT.dtype.element_ty), mask=real)


@triton.jit
def _gather(VALUES, PLACES, ROWS, TABLE, stride, start, stop, lane, width, SORTED: tl.constexpr, ENTRIES: tl.constexpr):
    """``sum of VALUES[e] * TABLE[ROWS[e]]`` over entries start .. stop - 1, in their order; (len(lane),) float32."""
    sums = tl.zeros_like(lane).to(tl.float32)
    inside = lane < width
    for first in range(start, stop, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        real = entry < stop
        row = tl.load(ROWS + entry, mask=real, other=0).to(tl.int64)
        place = entry
        if SORTED:
            place = tl.load(PLACES + entry, mask=real, other=0)
        value = tl.load(VALUES + place, mask=real, other=0.0).to(tl.float32)
        at = row[:, None] * stride + lane[None, :]
        part = tl.load(TABLE + at, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        # Masked lanes are 0 * 0; a weight of 0 on a row with infinities still gives NaN, as it should.
        sums += tl.sum(tl.where(real[:, None], value[:, None] * part, 0.0), 0)
    return sums


@triton.jit
def spmm_kernel(VALUES, INDICES, OFFSETS, TABLE, table_stride, OUT, width, WIDTH: tl.constexpr, ENTRIES: tl.constexpr):
    """One block of one row of ``values @ table[indices]``."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    start = tl.load(OFFSETS + row)
    stop = tl.load(OFFSETS + row + 1)
    sums = _gather(VALUES, INDICES, INDICES, TABLE, table_stride, start, stop, lane, width, False, ENTRIES)
    tl.store(OUT + row * width + lane, sums.to(OUT.dtype.element_ty), mask=lane < width)


@triton.jit
def sum_of_column(
    VALUES, PLACES, ROWS, STARTS, EXTRAS, PARTS, LEFT, left_stride, column, lane, width,
    SEGMENT: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """A column's sum: its first segment here, then the sums of its other segments, in order."""
    start = tl.load(STARTS + column)
    stop = tl.minimum(tl.load(STARTS + column + 1), start + SEGMENT)
    sums = _gather(VALUES, PLACES, ROWS, LEFT, left_stride, start, stop, lane, width, True, ENTRIES)
    for part in range(tl.load(EXTRAS + column), tl.load(EXTRAS + column + 1)):
        sums += tl.load(PARTS + part * width + lane, mask=lane < width, other=0.0)
    return sums


@triton.jit
def spmm_segments_kernel(
    VALUES, PLACES, ROWS, STARTS, EXTRAS, OWNERS, PARTS, LEFT, left_stride, d_sae, width,
    SEGMENT: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Sum of one segment after the first of a long column; programs without a segment return at once."""
    part = tl.program_id(0)
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    if part < tl.load(EXTRAS + d_sae):
        column = tl.load(OWNERS + part)
        start = tl.load(STARTS + column) + (part - tl.load(EXTRAS + column) + 1) * SEGMENT
        stop = tl.minimum(tl.load(STARTS + column + 1), start + SEGMENT)
        sums = _gather(VALUES, PLACES, ROWS, LEFT, left_stride, start, stop, lane, width, True, ENTRIES)
        tl.store(PARTS + part.to(tl.int64) * width + lane, sums, mask=lane < width)


@triton.jit
def spmm_columns_kernel(
    VALUES, PLACES, ROWS, STARTS, EXTRAS, PARTS, LEFT, left_stride, OUT, width,
    SEGMENT: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One block of one row of the gradient of a table; columns without entries write zeros."""
    column = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    sums = sum_of_column(
        VALUES, PLACES, ROWS, STARTS, EXTRAS, PARTS, LEFT, left_stride, column, lane, width, SEGMENT, ENTRIES
    )
    tl.store(OUT + column * width + lane, sums.to(OUT.dtype.element_ty), mask=lane < width)
