"""The sparse products of float32 on CPU: loops compiled by numba, each over a range of rows, shared by threads.

Where supports are a good share of all latents, as those of relu-family SAEs are at first, dense blocks of rows are
faster. They are bounded: rows x d_sae is not kept here either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saehooks.kernels import reference
from saehooks.kernels.cpu.numba_jit import numba_jit
from saehooks.kernels.cpu.threads import BLOCKS_PER_THREAD, GRAIN, blocks, spread
from saehooks.kernels.memory import reusable_empty
from saehooks.kernels.reference.products import moved_by
from saehooks.kernels.step import DEFAULT, Contribution, Step
from saehooks.support import Support


def serves(tensor: Tensor) -> bool:
    """Whether the loops take a tensor, of any shape, of this device and dtype; others go to the reference."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def sddmm(left: Tensor, table: Tensor, support: Support, step: Step = DEFAULT) -> Tensor:
    """(nnz,) products ``left[row] . table[index]`` of the entries; left (rows, d), table (d_sae, d)."""
    if not (serves(left) and serves(table)):
        return reference.sddmm(left, table, support)
    if dense_is_faster(support, table.shape[0]):
        return _dense_sddmm(left.detach(), table.detach(), support)
    out = torch.empty(support.indices.numel(), dtype=torch.float32, device="cpu")
    arrays = _arrays(left, table, support.indices, support.offsets)
    tile = _tile(table, support.indices.numel(), support.n_rows)
    spread(
        lambda start, stop: sddmm_rows(*arrays, start, stop, tile, out.numpy()),
        _row_blocks(support, table, tile),
    )
    return out


def spmm(values: Tensor, support: Support, table: Tensor, step: Step = DEFAULT) -> Tensor:
    """(rows, d) sums ``values @ table[indices]`` of each row; values (nnz,), table (d_sae, d)."""
    if not (serves(values) and serves(table)):
        return reference.spmm(values, support, table)
    if dense_is_faster(support, table.shape[0], table.detach()):
        return _dense_spmm(values.detach(), support, table.detach())
    out = reusable_empty(support.n_rows, table.shape[1])
    arrays = _arrays(values, support.indices, support.offsets, table)
    tile = _tile(table, support.indices.numel(), support.n_rows)
    spread(
        lambda start, stop: _spmm_rows(*arrays, start, stop, tile, out.numpy(), False),
        _row_blocks(support, table, tile),
    )
    return out


def sddmm_spmm(
    left: Tensor, table: Tensor, support: Support, values: Tensor | None, rate: Tensor | None, step: Step = DEFAULT
) -> tuple[Tensor, Tensor]:
    """(nnz,) ``values + rate * sddmm(left, table)``, and (rows, d) the sums `spmm` of these.

    A row of the table is still in the cache when it is added, so the second product costs a quarter of the first.
    """
    served = all(serves(tensor) for tensor in (left, table, values, rate) if tensor is not None)
    if not served or dense_is_faster(support, table.shape[0]):
        moved = moved_by(values, rate, sddmm(left, table, support))
        return moved, spmm(moved, support, table)
    moved = torch.empty(support.indices.numel(), dtype=torch.float32, device="cpu")
    out = reusable_empty(support.n_rows, table.shape[1])
    base = np.zeros(0, np.float32) if values is None else _arrays(values)[0]
    factor = np.float32(1.0) if rate is None else np.float32(rate.detach())
    arrays = _arrays(left, table, support.indices, support.offsets)
    tile = _tile(table, support.indices.numel(), support.n_rows)
    spread(
        lambda start, stop: _sddmm_spmm_rows(*arrays, base, factor, start, stop, tile, moved.numpy(), out.numpy()),
        _row_blocks(support, table, tile),
    )
    return moved, out


def refine(
    target: Tensor, table: Tensor, support: Support, values: Tensor, rate: Tensor, step: Step = DEFAULT
) -> Tensor:
    """(nnz,) ``values + rate * sddmm(target - spmm(values, table), table)``; target (rows, d), rate ().

    Row by row: what a row gathers for the first product is in the cache for the second.
    """
    served = all(serves(tensor) for tensor in (target, table, values, rate))
    if not served or dense_is_faster(support, table.shape[0]):
        missed = target - spmm(values, support, table)
        return moved_by(values, rate, sddmm(missed, table, support))
    moved = torch.empty(support.indices.numel(), dtype=torch.float32, device="cpu")
    arrays = _arrays(target, table, support.indices, support.offsets, values)
    factor = np.float32(rate.detach())
    spread(
        lambda start, stop: _refine_rows(*arrays, factor, start, stop, moved.numpy()),
        _row_blocks(support, table, len(table)),
    )
    return moved


def spmm_transposed(values: Tensor, support: Support, left: Tensor, d_sae: int) -> Tensor:
    """(d_sae, d) gradient of a table: row ``i`` sums ``value * left[row]`` over the entries with index ``i``."""
    return table_gradient([Contribution(values, support, left)], d_sae)


def table_gradient(parts: list[Contribution], d_sae: int) -> Tensor:
    """(d_sae, d) the sum of one or more `spmm_transposed`, in new memory, each row of which is written once."""
    if not all(serves(values) and serves(left) for values, _, left in parts):
        return reference.table_gradient(parts, d_sae)
    width = parts[0].left.shape[1]
    out = reusable_empty(d_sae, width)
    begun = False
    jobs: list[_Gathered] = []
    for values, support, left in parts:
        if dense_is_faster(support, d_sae, left.detach()):
            _dense_spmm_transposed(values.detach(), support, left.detach(), out if begun else out.zero_())
            begun = True
            continue
        index = support.by_latent(sort_by_latent, d_sae)
        if not jobs or jobs[-1].index is not index or len(jobs[-1].terms) == 2:
            jobs.append(_Gathered(index, [], d_sae))
        jobs[-1].add(values, left)
    # Blocks that stay in the cache from one part to the next, unless what is gathered from comes in tiles.
    untiled = all(job.tile >= job.rows for job in jobs)
    pieces = max(BLOCKS_PER_THREAD, d_sae // tile_rows(out)) if untiled else 1

    def work(start: int, stop: int) -> None:
        for i, job in enumerate(jobs):
            job.write(start, stop, out.numpy(), begun or i > 0)

    if jobs:
        spread(work, blocks(d_sae, max(1, GRAIN // width), pieces))
    return out


@dataclass
class _Gathered:
    """One part of a table's gradient, or two of one support, whose entries are then gone through once."""

    index: ByLatent
    terms: list[tuple[np.ndarray, np.ndarray]]
    """Values (nnz,) by latent, and what they multiply, (rows, d)."""
    d_sae: int

    def add(self, values: Tensor, left: Tensor) -> None:
        """Add a part: values (nnz,), left (rows, d)."""
        (matrix,) = _arrays(left)
        self.terms.append((values.detach()[self.index.places].numpy(), matrix))

    @property
    def rows(self) -> int:
        """Rows of the product."""
        return len(self.terms[0][1])

    @property
    def tile(self) -> int:
        """Rows that stay in the cache, of all that is gathered from."""
        return _tile(self.terms[0][1], self.index.rows.numel(), self.d_sae, len(self.terms))

    def write(self, start: int, stop: int, out: np.ndarray, add: bool) -> None:
        """Write rows start to stop of the gradient (d_sae, d), or add them."""
        values, left, *more = [array for term in self.terms for array in term]
        loop = _spmm_rows_twice if more else _spmm_rows
        loop(values, self.index.rows.numpy(), self.index.starts.numpy(), left, start, stop, self.tile, out, add, *more)


def _arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(tensor.detach().contiguous().numpy() for tensor in tensors)


TILE_BYTES = 3 * 2**19
"""Bytes of a table that stay in a processor's own cache."""

MIN_REUSE = 4
"""Entries of a row in a tile of the table, from which on going through the rows once a tile is faster."""


def tile_rows(table: Tensor | np.ndarray) -> int:
    """Rows of a float32 table that stay in the cache."""
    return max(1, TILE_BYTES // (4 * max(1, table.shape[1])))


def _tile(table: Tensor | np.ndarray, entries: int, rows: int, tables: int = 1) -> int:
    """Rows of a table that are gathered from at a time: all of them, or as many as stay in the cache while all rows
    of the product pass by, if those have enough entries there. Several tables of one size share the cache."""
    size, tile = table.shape[0], max(1, tile_rows(table) // tables)
    return tile if tile < size and entries * tile >= MIN_REUSE * rows * size else max(1, size)


def _row_blocks(support: Support, table: Tensor, tile: int) -> list[tuple[int, int]]:
    each = max(1, support.indices.numel() * table.shape[1] // max(1, support.n_rows))
    return blocks(support.n_rows, max(1, GRAIN // each), _pieces(table, tile))


def _pieces(table: Tensor, tile: int) -> int:
    """Blocks a thread: each block of rows reads a table that is tiled once more."""
    return BLOCKS_PER_THREAD if tile >= table.shape[0] else 1


class ByLatent(NamedTuple):
    """Entries of compressed rows, sorted by latent and then by row."""

    starts: Tensor
    """(d_sae + 1,) int64, where each latent starts."""
    rows: Tensor
    """(nnz,) int64, the row of each entry."""
    places: Tensor
    """(nnz,) int64, where the entry stands in the compressed rows."""


def sort_by_latent(indices: Tensor, offsets: Tensor, d_sae: int) -> ByLatent:
    """The index of a support (nnz,), (rows + 1,) by latent; `Support.by_latent` keeps it."""
    found = _count_by_latent(indices.contiguous().numpy(), offsets.contiguous().numpy(), d_sae)
    return ByLatent(*(torch.from_numpy(array) for array in found))


# ---------------------------------------------------------------- dense blocks

MAX_SHARE = 0.15
"""Share of selected latents from which on a dense product is faster than gathering."""

BLOCK_BYTES = 64 * 2**20
"""Most memory a dense block takes."""


def dense_is_faster(support: Support, d_sae: int, other: Tensor | None = None) -> bool:
    """Whether so many selected latents are better multiplied densely with ``other`` (rows, d).

    Where that holds a NaN or infinity they are not: times the zeros of a block it would reach rows that do not use it.
    """
    return support.indices.numel() > MAX_SHARE * support.n_rows * d_sae and (
        other is None or bool(other.sum().isfinite())
    )


def _dense_sddmm(left: Tensor, table: Tensor, support: Support) -> Tensor:
    """(nnz,) products ``left[row] . table[index]`` of the sampled entries; left (rows, d), table (d_sae, d)."""
    out = left.new_empty(support.indices.numel())
    for rows, entries, place, block in _dense_blocks(support, table.shape[0]):
        torch.mm(left[rows], table.T, out=block)
        torch.index_select(block.view(-1), 0, place, out=out[entries])
    return out


def _dense_spmm(values: Tensor, support: Support, table: Tensor) -> Tensor:
    """(rows, d) sums ``values @ table[indices]`` of each compressed row."""
    out = reusable_empty(support.n_rows, table.shape[1])
    for rows, entries, place, block in _dense_blocks(support, table.shape[0]):
        torch.mm(_scatter(values[entries], place, block), table, out=out[rows])
    return out


def _dense_spmm_transposed(values: Tensor, support: Support, left: Tensor, out: Tensor) -> None:
    """Add to row ``i`` of out (d_sae, d) the sum of ``value * left[row]`` over the entries with index ``i``."""
    for rows, entries, place, block in _dense_blocks(support, len(out)):
        out.addmm_(_scatter(values[entries], place, block).T, left[rows])


def _dense_blocks(support: Support, d_sae: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Consecutive rows, their entries, where in the dense block each entry lies, and the block."""
    indices, offsets, n_rows = support.indices, support.offsets, support.n_rows
    step = max(1, min(n_rows, BLOCK_BYTES // (4 * d_sae)))
    whole, rows = reusable_empty(step, d_sae), support.rows
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        entries = slice(int(offsets[start]), int(offsets[stop]))
        yield slice(start, stop), entries, (rows[entries] - start) * d_sae + indices[entries], whole[: stop - start]


def _scatter(values: Tensor, place: Tensor, block: Tensor) -> Tensor:
    block.zero_().view(-1)[place] = values
    return block


# ----------------------------------------------------------------------- loops


@numba_jit
def dots(x, table, places, found, out):
    """Write ``x . table[place]`` of the first found places, four at a time: rows of a table come slowly from memory."""
    d = x.size
    p = 0
    while p + 4 <= found:
        a, b = table[places[p]], table[places[p + 1]]
        c, e = table[places[p + 2]], table[places[p + 3]]
        s0 = np.float32(0.0)
        s1 = np.float32(0.0)
        s2 = np.float32(0.0)
        s3 = np.float32(0.0)
        for j in range(d):
            s0 += x[j] * a[j]
            s1 += x[j] * b[j]
            s2 += x[j] * c[j]
            s3 += x[j] * e[j]
        out[p] = s0
        out[p + 1] = s1
        out[p + 2] = s2
        out[p + 3] = s3
        p += 4
    while p < found:
        a = table[places[p]]
        s0 = np.float32(0.0)
        for j in range(d):
            s0 += x[j] * a[j]
        out[p] = s0
        p += 1


@numba_jit
def sddmm_rows(left, table, indices, offsets, start, stop, tile, out):
    """Write ``left[row] . table[index]`` for the entries of rows start to stop, a tile of the table at a time."""
    after = offsets[start:stop].copy()
    for limit in range(tile, table.shape[0] + tile, tile):
        for r in range(start, stop):
            first = after[r - start]
            last = _below(indices, first, offsets[r + 1], limit)
            dots(left[r], table, indices[first:last], last - first, out[first:last])
            after[r - start] = last


@numba_jit
def _below(indices, first, end, limit):
    """The first entry from ``first`` on whose index is not below a limit, or ``end``."""
    last = first
    while last < end and indices[last] < limit:
        last += 1
    return last


@numba_jit
def _spmm_rows(values, indices, offsets, table, start, stop, tile, out, add):
    """Write rows start to stop of the sums of ``value * table[index]``, a tile of the table at a time, or add them."""
    after = offsets[start:stop].copy()
    for limit in range(tile, table.shape[0] + tile, tile):
        for r in range(start, stop):
            if limit == tile and not add:
                out[r][:] = 0
            first = after[r - start]
            last = _below(indices, first, offsets[r + 1], limit)
            _add_rows(values, indices, first, last, table, out[r])
            after[r - start] = last


@numba_jit
def _sddmm_spmm_rows(left, table, indices, offsets, base, rate, start, stop, tile, moved, out):
    """`sddmm_rows` and, of each entry's ``base + rate *`` that, `_spmm_rows`, of rows start to stop."""
    after = offsets[start:stop].copy()
    for limit in range(tile, table.shape[0] + tile, tile):
        for r in range(start, stop):
            if limit == tile:
                out[r][:] = 0
            first = after[r - start]
            last = _below(indices, first, offsets[r + 1], limit)
            dots(left[r], table, indices[first:last], last - first, moved[first:last])
            for p in range(first, last):
                moved[p] = rate * moved[p] + (base[p] if base.size else np.float32(0.0))
            _add_rows(moved, indices, first, last, table, out[r])
            after[r - start] = last


@numba_jit
def _refine_rows(target, table, indices, offsets, values, rate, start, stop, moved):
    """Write ``value + rate * missed . table[index]`` of rows start to stop; missed: target less what values sum to."""
    missed = np.empty(target.shape[1], np.float32)
    for r in range(start, stop):
        first, last = offsets[r], offsets[r + 1]
        missed[:] = 0
        _add_rows(values, indices, first, last, table, missed)
        for j in range(missed.size):
            missed[j] = target[r, j] - missed[j]
        dots(missed, table, indices[first:last], last - first, moved[first:last])
        for p in range(first, last):
            moved[p] = values[p] + rate * moved[p]


@numba_jit
def _add_rows(values, indices, first, last, table, into):
    """Add ``value * table[index]`` of entries first to last, four at a time."""
    width = into.size
    p = first
    while p + 4 <= last:
        v0, v1, v2, v3 = values[p], values[p + 1], values[p + 2], values[p + 3]
        t0, t1 = table[indices[p]], table[indices[p + 1]]
        t2, t3 = table[indices[p + 2]], table[indices[p + 3]]
        for j in range(width):
            into[j] += (v0 * t0[j] + v1 * t1[j]) + (v2 * t2[j] + v3 * t3[j])
        p += 4
    if p + 2 <= last:
        v0, v1 = values[p], values[p + 1]
        t0, t1 = table[indices[p]], table[indices[p + 1]]
        for j in range(width):
            into[j] += v0 * t0[j] + v1 * t1[j]
        p += 2
    if p < last:
        v0 = values[p]
        t0 = table[indices[p]]
        for j in range(width):
            into[j] += v0 * t0[j]


@numba_jit
def _spmm_rows_twice(values, indices, offsets, table, start, stop, tile, out, add, values2, table2):
    """As `_spmm_rows`, of the sums of ``value * table[index] + value2 * table2[index]``."""
    after = offsets[start:stop].copy()
    for limit in range(tile, table.shape[0] + tile, tile):
        for r in range(start, stop):
            if limit == tile and not add:
                out[r][:] = 0
            first = after[r - start]
            last = _below(indices, first, offsets[r + 1], limit)
            _add_rows_twice(values, values2, indices, first, last, table, table2, out[r])
            after[r - start] = last


@numba_jit
def _add_rows_twice(values, values2, indices, first, last, table, table2, into):
    """Add ``value * table[index] + value2 * table2[index]`` of entries first to last, two at a time."""
    width = into.size
    p = first
    while p + 2 <= last:
        v0, v1, w0, w1 = values[p], values[p + 1], values2[p], values2[p + 1]
        t0, t1 = table[indices[p]], table[indices[p + 1]]
        u0, u1 = table2[indices[p]], table2[indices[p + 1]]
        for j in range(width):
            into[j] += (v0 * t0[j] + w0 * u0[j]) + (v1 * t1[j] + w1 * u1[j])
        p += 2
    if p < last:
        v0, w0 = values[p], values2[p]
        t0, u0 = table[indices[p]], table2[indices[p]]
        for j in range(width):
            into[j] += v0 * t0[j] + w0 * u0[j]


@numba_jit
def _count_by_latent(indices, offsets, d_sae):
    """Entries sorted by latent, by counting: where each latent starts, and the row and place of its entries."""
    starts = np.zeros(d_sae + 1, np.int64)
    for p in range(indices.size):
        starts[indices[p] + 1] += 1
    for i in range(d_sae):
        starts[i + 1] += starts[i]
    rows = np.empty(indices.size, np.int64)
    places = np.empty(indices.size, np.int64)
    after = starts[:-1].copy()
    for r in range(offsets.size - 1):
        for p in range(offsets[r], offsets[r + 1]):
            q = after[indices[p]]
            after[indices[p]] = q + 1
            rows[q] = r
            places[q] = p
    return starts, rows, places
