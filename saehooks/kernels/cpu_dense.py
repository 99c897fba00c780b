"""The sparse products by way of dense blocks of rows, faster where supports are a good share of all latents.

Relu-family SAEs start with half of their latents active. Blocks are bounded: rows x d_sae is not kept here either.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saehooks.codes import rows_of
from saehooks.kernels.memory import empty

SHARE = 0.15
"""Share of selected latents from which on a dense product is faster than gathering."""

BLOCK_BYTES = 64 * 2**20
"""Most memory a dense block takes."""


def pays(nnz: int, rows: int, d_sae: int, other: Tensor | None = None) -> bool:
    """Whether so many selected latents are better multiplied densely with ``other``.

    Where that holds a NaN or infinity they are not: times the zeros of a block it would reach rows that do not use it.
    """
    return nnz > SHARE * rows * d_sae and (other is None or bool(other.sum().isfinite()))


def sddmm(left: Tensor, table: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    """(nnz,) products ``left[row] . table[index]`` of the sampled entries; left (rows, d), table (d_sae, d)."""
    out = left.new_empty(indices.numel())
    for rows, entries, place, block in _blocks(indices, offsets, table.shape[0]):
        torch.mm(left[rows], table.T, out=block)
        torch.index_select(block.view(-1), 0, place, out=out[entries])
    return out


def spmm(values: Tensor, indices: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """(rows, d) sums ``values @ table[indices]`` of each compressed row."""
    out = empty(offsets.numel() - 1, table.shape[1])
    for rows, entries, place, block in _blocks(indices, offsets, table.shape[0]):
        torch.mm(_scatter(values[entries], place, block), table, out=out[rows])
    return out


def spmm_transposed(values: Tensor, indices: Tensor, offsets: Tensor, left: Tensor, d_sae: int) -> Tensor:
    """(d_sae, d) gradient of a table: row ``i`` sums ``value * left[row]`` over the entries with index ``i``."""
    out = empty(d_sae, left.shape[1]).zero_()
    for rows, entries, place, block in _blocks(indices, offsets, d_sae):
        out.addmm_(_scatter(values[entries], place, block).T, left[rows])
    return out


def _blocks(indices: Tensor, offsets: Tensor, d_sae: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Consecutive rows, their entries, where in the dense block each entry lies, and the block."""
    n_rows = offsets.numel() - 1
    step = max(1, min(n_rows, BLOCK_BYTES // (4 * d_sae)))
    whole, rows = empty(step, d_sae), rows_of(offsets, indices.numel())
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        entries = slice(int(offsets[start]), int(offsets[stop]))
        yield slice(start, stop), entries, (rows[entries] - start) * d_sae + indices[entries], whole[: stop - start]


def _scatter(values: Tensor, place: Tensor, block: Tensor) -> Tensor:
    block.zero_().view(-1)[place] = values
    return block
