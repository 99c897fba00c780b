"""Triton kernels of the sparse products. No atomics: every sum has one owner and one order.

A program of `sddmm` or `spmm` owns a row (and for `spmm` a block of its width). A program of `spmm_columns` owns a
column of the support, sorted by column beforehand; a column longer than SEGMENT entries is cut into segments, whose
sums `spmm_segments` makes first and the column's owner adds up in order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sddmm(
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
def spmm(VALUES, INDICES, OFFSETS, TABLE, table_stride, OUT, width, WIDTH: tl.constexpr, ENTRIES: tl.constexpr):
    """One block of one row of ``values @ table[indices]``."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    start = tl.load(OFFSETS + row)
    stop = tl.load(OFFSETS + row + 1)
    sums = _gather(VALUES, INDICES, INDICES, TABLE, table_stride, start, stop, lane, width, False, ENTRIES)
    tl.store(OUT + row * width + lane, sums.to(OUT.dtype.element_ty), mask=lane < width)


@triton.jit
def column_sum(
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
def spmm_segments(
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
def spmm_columns(
    VALUES, PLACES, ROWS, STARTS, EXTRAS, PARTS, LEFT, left_stride, OUT, width,
    SEGMENT: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One block of one row of the gradient of a table; columns without entries write zeros."""
    column = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    sums = column_sum(
        VALUES, PLACES, ROWS, STARTS, EXTRAS, PARTS, LEFT, left_stride, column, lane, width, SEGMENT, ENTRIES
    )
    tl.store(OUT + column * width + lane, sums.to(OUT.dtype.element_ty), mask=lane < width)


@triton.jit
def center(VALUES, OFFSETS, OUT, total, ENTRIES: tl.constexpr):
    """Shift the entries of one row by a constant, so that they sum to ``total``; in float64, which large rows need."""
    row = tl.program_id(0)
    start = tl.load(OFFSETS + row)
    stop = tl.load(OFFSETS + row + 1)
    size = (stop - start).to(tl.float64)
    sums = tl.zeros((ENTRIES,), tl.float64)
    for first in range(start, stop, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        sums += tl.load(VALUES + entry, mask=entry < stop, other=0.0).to(tl.float32).to(tl.float64)
    mean = tl.sum(sums, 0) / size
    sums = tl.zeros((ENTRIES,), tl.float64)
    for first in range(start, stop, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        value = tl.load(VALUES + entry, mask=entry < stop, other=0.0).to(tl.float32).to(tl.float64)
        sums += tl.where(entry < stop, value - mean, 0.0)
    shift = (tl.sum(sums, 0) - total) / size
    for first in range(start, stop, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        value = tl.load(VALUES + entry, mask=entry < stop, other=0.0).to(tl.float32).to(tl.float64)
        tl.store(OUT + entry, ((value - mean) - shift).to(tl.float32).to(OUT.dtype.element_ty), mask=entry < stop)
