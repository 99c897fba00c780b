"""Triton kernels that select across rows, without a sort and without the host: the largest scores of a whole batch.

`maxima` reads the scores once and keeps the maxima of each row's groups of strided columns. As many maxima as there are
matches to give out bound the threshold from below, so `gather` lists only scores that reach the bound, from groups that
do; rows with more than CAP of them are streamed again wherever they are asked. The threshold itself is found digit by
digit: `tally_maxima` and `tally_rows` count how often each digit follows the digits so far, `descend` chooses. Floats
are compared by their bits, which for positive ones order as they do. Counts are integers, so their atomics are exact
and the result has one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saehooks.kernels.triton_select import TOPK, count_candidates, largest, list_candidates, odd_place
from saehooks.kernels.triton_thresholds import finite, read

BINS = tl.constexpr(256)
"""Values of a digit: 8 bits."""


@triton.jit
def maxima(Z, stride, BIAS, MAXIMA, BEST, d_sae, BIASED: tl.constexpr, TILE: tl.constexpr):
    """The largest score of a row and of each of its groups, which for a row without a finite largest are -inf."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE)
    top = tl.full((TILE,), float("-inf"), tl.float32)
    for start in tl.range(0, d_sae, TILE, loop_unroll_factor=2):  # more loads under way at a time
        z = read(Z + row * stride, BIAS, start + lane, start + lane < d_sae, BIASED)
        top = tl.maximum(top, z, propagate_nan=tl.PropagateNan.ALL)
    best = largest(top)
    tl.store(BEST + row, best)
    tl.store(MAXIMA + row * TILE + lane, tl.where(finite(best), top, float("-inf")))


@triton.jit
def _digits(z, prefix, SHIFT: tl.constexpr):
    """How many positive scores with these higher digits have each digit, whose last bit is bit SHIFT: (256,) int32."""
    bits = z.to(tl.int32, bitcast=True)
    counted = (bits > 0) & (bits >> SHIFT >> 8 == prefix)
    counts = tl.histogram(tl.where(counted, (bits >> SHIFT) & 255, 0), BINS)
    others = tl.sum((counted == 0).to(tl.int32), 0)  # they fell into bin 0
    return counts - tl.where(tl.arange(0, BINS) == 0, others, 0)


@triton.jit
def _add(COUNTS, counts):
    tl.atomic_add(COUNTS + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def tally_maxima(MAXIMA, COUNTS, PREFIX, groups, share, SHIFT: tl.constexpr, FOLD: tl.constexpr, BLOCK: tl.constexpr):
    """Count digits of larger groups, each of FOLD maxima; a program counts ``share`` of them."""
    prefix = tl.load(PREFIX)
    counts = tl.zeros((BINS,), tl.int32)
    first = tl.program_id(0) * share
    for start in range(first, tl.minimum(first + share, groups), BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.full((BLOCK,), float("-inf"), tl.float32)
        for part in tl.static_range(FOLD):
            z = tl.maximum(z, tl.load(MAXIMA + part * groups + at, mask=at < groups, other=float("-inf")))
        counts += _digits(z, prefix, SHIFT)
    _add(COUNTS, counts)


@triton.jit
def descend(COUNTS, PREFIX, RANK, CLAMP: tl.constexpr):
    """Append to the prefix the digit of the score of this rank, and make the rank that among scores with the prefix.

    Where there are fewer positive scores the digits are 0, or with CLAMP those of the smallest.
    """
    bins = tl.arange(0, BINS)
    counts = tl.load(COUNTS + bins)
    total = tl.sum(counts, 0)
    prefix = tl.load(PREFIX)
    rank = tl.load(RANK)
    if CLAMP:
        rank = tl.minimum(rank, total)
    reaching = total - tl.cumsum(counts, 0) + counts
    digit = tl.max(tl.where((reaching >= rank) & (rank > 0), bins, 0), 0)
    tl.store(PREFIX, prefix * 256 + digit)
    tl.store(RANK, rank - tl.sum(tl.where(bins > digit, counts, 0), 0))


@triton.jit
def gather(
    Z, stride, BIAS, MAXIMA, PREFIX, GROUPS, VALUES, PLACES, COUNTS, BEST, d_sae,
    SHIFT: tl.constexpr, BIASED: tl.constexpr, TILE: tl.constexpr, GATHER: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Scores of a row that reach the bound: the first CAP of them, by latent, and how many there are.

    A row without a finite largest score has one, its argmax.
    """
    row = tl.program_id(0).to(tl.int64)
    z_row = Z + row * stride
    best = tl.load(BEST + row)
    n = 1
    if finite(best):
        bits = tl.load(PREFIX) << SHIFT
        bound = tl.maximum(bits, 1).to(tl.float32, bitcast=True)  # every positive score reaches that of bits 1
        opened = tl.load(MAXIMA + row * TILE + tl.arange(0, TILE)) >= bound
        many = tl.sum(opened.to(tl.int32), 0)
        if many <= CAP:
            n = list_candidates(
                z_row, BIAS, BEST, VALUES + row * CAP, PLACES + row * CAP, GROUPS + row * CAP, opened, many, best,
                bound, bound, d_sae, 1, bound, TOPK, BIASED, True, TILE, GATHER, CAP,
            )  # fmt: skip
        else:
            n = count_candidates(z_row, BIAS, opened, best, bound, d_sae, bound, TOPK, BIASED, TILE)
    else:
        tl.store(VALUES + row * CAP, best)
        tl.store(PLACES + row * CAP, odd_place(z_row, BIAS, best, d_sae, TILE, BIASED))
    tl.store(COUNTS + row, n)


@triton.jit
def tally_rows(
    Z, stride, BIAS, VALUES, LISTED, BEST, COUNTS, PREFIX, d_sae,
    SHIFT: tl.constexpr, BIASED: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count digits of what a row lists, or of all its scores if its list is not complete."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(LISTED + row)
    lane = tl.arange(0, BLOCK)
    if finite(tl.load(BEST + row)) & (n > 0):
        prefix = tl.load(PREFIX)
        counts = tl.zeros((BINS,), tl.int32)
        if n <= CAP:
            for start in range(0, n, BLOCK):
                slot = start + lane
                z = tl.load(VALUES + row * CAP + slot, mask=slot < n, other=float("-inf"))
                counts += _digits(z, prefix, SHIFT)
        else:
            for start in range(0, d_sae, BLOCK):
                z = read(Z + row * stride, BIAS, start + lane, start + lane < d_sae, BIASED)
                counts += _digits(z, prefix, SHIFT)
        _add(COUNTS, counts)


@triton.jit
def count_rows(
    Z, stride, BIAS, VALUES, LISTED, BEST, TAU, ABOVE, TIES, d_sae,
    BIASED: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many scores of a row exceed the threshold of the batch and how many equal it; an odd row has its argmax."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(LISTED + row)
    tau = tl.load(TAU)
    lane = tl.arange(0, BLOCK)
    above = 1
    ties = 0
    if finite(tl.load(BEST + row)):
        over = tl.zeros((BLOCK,), tl.int32)
        equal = tl.zeros((BLOCK,), tl.int32)
        if n <= CAP:
            for start in range(0, n, BLOCK):
                slot = start + lane
                z = tl.load(VALUES + row * CAP + slot, mask=slot < n, other=float("-inf"))
                over += (z > tau).to(tl.int32)
                equal += (z == tau).to(tl.int32)
        else:
            for start in range(0, d_sae, BLOCK):
                z = read(Z + row * stride, BIAS, start + lane, start + lane < d_sae, BIASED)
                over += (z > tau).to(tl.int32)
                equal += (z == tau).to(tl.int32)
        above = tl.sum(over, 0)
        ties = tl.sum(equal, 0)
    tl.store(ABOVE + row, above)
    tl.store(TIES + row, ties)
