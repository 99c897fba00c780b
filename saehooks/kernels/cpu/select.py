"""Selection of float32 on CPU: exact thresholds without sorting a row, in loops compiled by numba.

The maxima of groups of scores bound the threshold from below, since the threshold of a subset never exceeds that of
the whole; only scores above the bound are candidates, and the exact threshold is found among them in float64. Every
buffer can hold a whole row, so ties and supports as large as the dictionary take the same path, only slower.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from saehooks.kernels import reference
from saehooks.kernels.cpu.numba_jit import numba_jit
from saehooks.kernels.cpu.products import serves
from saehooks.kernels.cpu.threads import BLOCKS_PER_THREAD, GRAIN, blocks, spread
from saehooks.kernels.cpu.thresholds import (
    NONE,
    THRESHOLD,
    TOPK,
    described,
    kth_largest,
    ordered_key,
    settle,
    simplex_threshold,
)
from saehooks.kernels.rules import Entmax, RowRule, Sparsemax, Threshold, TopK
from saehooks.kernels.step import DEFAULT, Step
from saehooks.support import Support, offsets_of

RULES = (Sparsemax, Entmax, TopK, Threshold)
"""What these loops know; the reference selects by other rules."""


def select_rows(scores: Tensor, rule: RowRule, step: Step = DEFAULT) -> Support:
    """Support of given scores (rows, d_sae) by a row rule."""
    rows, d_sae = scores.shape
    if not serves(scores) or not isinstance(rule, RULES) or rows == 0 or d_sae == 0:
        return reference.select_rows(scores, rule)
    kind, k, alpha, theta = described(rule, d_sae)
    groups = group_count(d_sae, k)
    matrix = scores.detach().contiguous().numpy()
    sizes = torch.empty(rows, dtype=torch.int64, device="cpu")
    thresholds = torch.full((rows,), float(theta.min()), dtype=torch.float32, device="cpu")
    size_array, threshold_array = sizes.numpy(), thresholds.numpy()

    def select(start: int, stop: int, indices: np.ndarray, picked: np.ndarray) -> tuple[int, int]:
        return _select_range(
            matrix, start, stop, kind, k, alpha, theta, groups, indices, picked, size_array, threshold_array
        )

    indices, picked = gathered(select, rows, d_sae, d_sae, max(128, 2 * k))
    return Support(indices, offsets_of(sizes), thresholds, picked)


SelectRange = Callable[[int, int, np.ndarray, np.ndarray], tuple[int, int]]
"""Selects rows start to stop into indices and picked, until those are full; says the first row that was not done, and
how many entries were written."""


def gathered(
    select: SelectRange, rows: int, cost: int, least: int, per_row: int, per_thread: int = BLOCKS_PER_THREAD
) -> tuple[Tensor, Tensor]:
    """(nnz,) int64 latents and (nnz,) float32 scores that a compiled loop selects from all rows, shared by threads.

    Args:
        select: the loop.
        rows: how many there are.
        cost: scores that a row looks at.
        least: entries that there must be room for, whatever is selected.
        per_row: entries of a row that there is room for at first.
        per_thread: blocks of rows that each thread gets.
    """
    ranges = blocks(rows, max(1, GRAIN // cost), per_thread)
    parts = chain.from_iterable(spread(lambda start, stop: parts_of(select, start, stop, least, per_row), ranges))
    indices, picked = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
    return indices, picked


def parts_of(
    select: SelectRange, start: int, stop: int, least: int, per_row: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What a loop selects from rows start to stop, in parts: each has twice the room of the one before."""
    parts, room = [], max(least, (stop - start) * per_row)
    while start < stop:
        indices, picked = np.empty(room, np.int64), np.empty(room, np.float32)
        start, used = select(start, stop, indices, picked)
        parts.append((indices[:used], picked[:used]))
        room = max(least, 2 * room)
    return parts


# ----------------------------------------------------------------------- loops

GROUP = 64
"""Most scores in a group."""

BLOCK = 64
"""Neighbouring scores tested at once for a candidate."""


def group_count(d_sae: int, k: int = 0) -> int:
    """Number of strided groups: enough for a tight bound (and for k of them), few enough to be cheap."""
    return min(d_sae, max(-(-d_sae // GROUP), min(256, -(-d_sae // 8)), 2 * k))


@numba_jit
def summarise(row, maxima, sums):
    """Fill the maxima of strided groups (column mod their number); say whether every score of the row is finite.

    Neighbours, often alike, fall into different groups. A NaN or infinity shows in the sums.
    """
    groups = maxima.size
    d_sae = row.size
    for g in range(groups):
        maxima[g] = row[g]
        sums[g] = row[g]
    start = groups
    while start + 4 * groups <= d_sae:
        a = row[start : start + groups]
        b = row[start + groups : start + 2 * groups]
        c = row[start + 2 * groups : start + 3 * groups]
        d = row[start + 3 * groups : start + 4 * groups]
        for g in range(groups):
            x = a[g] if a[g] > b[g] else b[g]
            y = c[g] if c[g] > d[g] else d[g]
            x = x if x > y else y
            maxima[g] = x if x > maxima[g] else maxima[g]
            sums[g] += (a[g] + b[g]) + (c[g] + d[g])
        start += 4 * groups
    while start < d_sae:
        a = row[start : min(start + groups, d_sae)]
        for g in range(a.size):
            maxima[g] = a[g] if a[g] > maxima[g] else maxima[g]
            sums[g] += a[g]
        start += groups
    total = np.float32(0.0)
    for g in range(groups):
        total += sums[g]
    # inf - inf and NaN - NaN are NaN. Finite scores whose sum overflows are looked at one by one, later.
    return total - total == np.float32(0.0)


@numba_jit
def argmax(row):
    """The first NaN, else the first of the largest scores, as ``torch.max`` has it."""
    place = 0
    for j in range(row.size):
        if row[j] != row[j]:
            return j
        if row[j] > row[place]:
            place = j
    return place


@numba_jit
def largest(values):
    """Largest of some numbers, none of which is NaN."""
    best = values[0]
    for j in range(values.size):
        best = values[j] if values[j] > best else best
    return best


@numba_jit
def candidates(row, bound, places):
    """Write the places of the scores of at least ``bound``, ascending; return how many."""
    found = NONE
    d_sae = row.size
    whole = d_sae // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        hits = 0
        for j in range(start, start + BLOCK):
            hits += row[j] >= bound
        if hits:
            for j in range(start, start + BLOCK):
                places[found] = j
                found += np.uint64(row[j] >= bound)
    for j in range(whole, d_sae):
        places[found] = j
        found += np.uint64(row[j] >= bound)
    return np.int64(found)


@numba_jit
def places_above(row, theta, places):
    """Write the places of the scores strictly above ``theta``, ascending; return how many.

    That is not "at least the next number": where the processor counts denormal numbers as 0, the next one after 0 is 0.
    """
    found = NONE
    d_sae = row.size
    whole = d_sae // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        hits = 0
        for j in range(start, start + BLOCK):
            hits += row[j] > theta
        if hits:
            for j in range(start, start + BLOCK):
                places[found] = j
                found += np.uint64(row[j] > theta)
    for j in range(whole, d_sae):
        places[found] = j
        found += np.uint64(row[j] > theta)
    return np.int64(found)


@numba_jit
def above(row, theta, places):
    """Places of the scores strictly above theta (d_sae,), or above its only element."""
    if theta.size == 1:
        return places_above(row, theta[0], places)
    found = 0
    for start in range(0, row.size, BLOCK):
        stop = min(start + BLOCK, row.size)
        hits = 0
        for j in range(start, stop):
            hits += row[j] > theta[j]
        if hits:
            for j in range(start, stop):
                places[found] = j
                found += row[j] > theta[j]
    return found


@numba_jit
def lower_bound(maxima, work, kind, k, alpha):
    """A score that whatever a rule selects from a finite row reaches, by the maxima of its groups."""
    if kind == TOPK:
        bound = np.float32(0.0)
        if k <= maxima.size:
            keys, bits = work.view(np.int32), maxima.view(np.int32)
            for g in range(maxima.size):
                keys[g] = ordered_key(bits[g])
            bound = max(bound, np.int32(ordered_key(kth_largest(keys, maxima.size, k))).view(np.float32))
        return bound
    shift = np.float64(largest(maxima))
    for g in range(maxima.size):
        work[g] = np.float64(maxima[g]) - shift
    bound = simplex_threshold(work, maxima.size, kind, alpha)
    # A hair below, so that rounding the bound to float32 loses no candidate.
    return np.float32(shift + bound - 1.2e-7 * (abs(shift) + abs(bound) + 1.0))


@numba_jit
def _select_range(scores, start, stop, kind, k, alpha, theta, groups, indices, picked, sizes, thresholds):
    """Select rows start to stop of scores into indices and picked, until those are full.

    Returns:
        The first row that was not done, and how many entries were written.
    """
    d_sae = scores.shape[1]
    maxima = np.empty(groups, np.float32)
    sums = np.empty(groups, np.float32)
    work = np.empty(d_sae, np.float64)
    places = np.empty(d_sae + 1, np.int32)
    few = np.empty(d_sae, np.float32)
    used = 0
    for r in range(start, stop):
        row = scores[r]
        finite = summarise(row, maxima, sums)
        if not finite:
            best = argmax(row)
            finite = abs(row[best]) < np.inf
        if not finite:
            places[0] = best
            size = 1
            threshold = np.float64(row[best])
        elif kind == THRESHOLD:
            size = above(row, theta, places)
            threshold = np.float64(thresholds[r])
        else:
            bound = lower_bound(maxima, work, kind, k, alpha)
            found = (
                places_above(row, bound, places) if kind == TOPK and bound == 0.0 else candidates(row, bound, places)
            )
            for j in range(found):
                few[j] = row[places[j]]
            size, threshold = settle(few, places, found, work, kind, k, alpha, theta)
        if used + size > indices.size:
            return r, used
        for j in range(size):
            indices[used + j] = places[j]
            picked[used + j] = row[places[j]]
        sizes[r] = size
        thresholds[r] = threshold
        used += size
    return stop, used
