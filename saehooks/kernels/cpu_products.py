"""Loops of the sparse products, compiled by numba. Each serves a range of rows, so that threads can share the work."""

from __future__ import annotations

import numpy as np

from saehooks.kernels.compiled import compiled


@compiled
def sddmm_rows(left, table, indices, offsets, start, stop, out):
    """Write ``left[row] . table[index]`` for the entries of rows start to stop."""
    width = table.shape[1]
    for r in range(start, stop):
        x = left[r]
        for p in range(offsets[r], offsets[r + 1]):
            y = table[indices[p]]
            total = np.float32(0.0)
            for j in range(width):
                total += x[j] * y[j]
            out[p] = total


@compiled
def spmm_rows(values, indices, offsets, table, start, stop, out):
    """Write rows start to stop of the sums of ``value * table[index]``, four entries at a time."""
    width = table.shape[1]
    for r in range(start, stop):
        into = out[r]
        into[:] = 0
        p = offsets[r]
        end = offsets[r + 1]
        while p + 4 <= end:
            v0, v1, v2, v3 = values[p], values[p + 1], values[p + 2], values[p + 3]
            t0, t1 = table[indices[p]], table[indices[p + 1]]
            t2, t3 = table[indices[p + 2]], table[indices[p + 3]]
            for j in range(width):
                into[j] += (v0 * t0[j] + v1 * t1[j]) + (v2 * t2[j] + v3 * t3[j])
            p += 4
        while p < end:
            v0 = values[p]
            t0 = table[indices[p]]
            for j in range(width):
                into[j] += v0 * t0[j]
            p += 1


@compiled
def columns_of(indices, offsets, d_sae):
    """Entries sorted by column, by counting: where each column starts, and the row and place of its entries."""
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
