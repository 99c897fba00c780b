"""Triton kernels that select from given scores: one program a row, no sort, no capacity that a row could exceed.

Three launches. `collect` reads a row once and keeps, in registers, the maximum of each group of strided columns; a
threshold of those maxima bounds the row's own from below, so only groups above it are read again, side by side, and
only scores above it are candidates. A threshold that is given opens the groups that hold a score above it. `finish`
finds the exact threshold among the candidates, `fill` writes the compressed rows. Up to CAP candidates a row are kept
aside; a row with more (ties, all equal, the first steps of training) is streamed again by `finish` and `fill`, on the
device, with the same result.

A rule is (KIND, parameters). SIMPLEX is sparsemax and entmax: weights ``((v - tau)+) ** power`` sum to 1, where
``v = slope * (score - best)``. TOPK keeps the k largest positive scores, ties by lowest latent. THRESHOLD keeps scores
above theta. A row whose best score is not finite keeps its argmax alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saehooks.kernels.triton_thresholds import (
    finite,
    kth,
    kth_streamed,
    reaching,
    read,
    simplex_streamed,
    simplex_threshold,
    topk_bound,
)

SIMPLEX = tl.constexpr(0)
TOPK = tl.constexpr(1)
THRESHOLD = tl.constexpr(2)

SLACK = tl.constexpr(4e-6)
"""How far below the bound of the group maxima, in units of v, a candidate may lie: more than float32 sums err."""


@triton.jit
def _bound(top, best, k, slope_of, power, KIND: tl.constexpr, LINEAR: tl.constexpr):
    """What a row's candidates reach, from its group maxima: in units of v for SIMPLEX, of the scores for TOPK."""
    if KIND == SIMPLEX:
        bound = simplex_threshold((top - best) * slope_of, best * 0.0 - 1.0, power, LINEAR) - SLACK
    else:
        smallest = (tl.program_id(0) * 0 + 1).to(tl.float32, bitcast=True)  # a positive score reaches it
        bound = tl.maximum(topk_bound(top, best, k), smallest)
    return bound


@triton.jit
def reaches(z, best, bound, slope_of, KIND: tl.constexpr):
    """Which scores, or group maxima, may be selected."""
    if KIND == SIMPLEX:
        reached = (z - best) * slope_of >= bound
    else:
        reached = z >= bound
    return reached


@triton.jit
def exceeds(z, THETA, theta, column, mask, SCALAR: tl.constexpr):
    """Which scores exceed their threshold: one number, or one for each latent."""
    if SCALAR:
        above = mask & (z > theta)
    else:
        above = mask & (z > tl.load(THETA + column, mask=mask, other=float("inf")))
    return above


@triton.jit
def largest(top):
    """The largest of some scores, NaN if one is: one integer maximum, since bits of floats order as integers."""
    bits = top.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    most = tl.max(tl.where(top == top, ordered, 0x7FFFFFFF), 0)  # NaN, from above infinity
    return (most ^ ((most >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def odd_place(z_row, BIAS, best, d_sae, TILE: tl.constexpr, BIASED: tl.constexpr):
    """The first latent whose score is a row's best, which is not finite; NaN is found by being unlike itself."""
    lane = tl.arange(0, TILE)
    place = d_sae
    for start in range(0, d_sae, TILE):
        column = start + lane
        z = read(z_row, BIAS, column, column < d_sae, BIASED)
        named = tl.where(best == best, z == best, z != z) & (column < d_sae)
        place = tl.minimum(place, tl.min(tl.where(named, column, d_sae), 0))
    return place


@triton.jit
def list_candidates(
    z_row, BIAS, THETA, values, places, groups, opened, many, best, bound, theta, d_sae, step, slope_of,
    KIND: tl.constexpr, BIASED: tl.constexpr, SCALAR: tl.constexpr, TILE: tl.constexpr, GATHER: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """List the first CAP candidates in the opened groups, of which there are ``many``, by latent, and count them all.

    The groups are read side by side, as a short row of their own, so that one read, one sum and one pair of stores
    serve many tiles; there may be no more than CAP of them.
    """
    tl.store(groups + tl.cumsum(opened.to(tl.int32), 0) - 1, tl.arange(0, TILE), mask=opened)
    tl.debug_barrier()  # threads read what others stored
    width = many * tl.cdiv(d_sae, TILE)
    n = 0
    for start in range(0, width, GATHER):
        at = start + tl.arange(0, GATHER)
        column = at // many * TILE + tl.load(groups + at % many, mask=at < width, other=0)
        real = (at < width) & (column < d_sae)
        z = read(z_row, BIAS, column, real, BIASED)
        if KIND == THRESHOLD:
            hit = exceeds(z, THETA, theta, column, real, SCALAR)
        else:
            hit = real & reaches(z, best, bound, slope_of, KIND)
        slot = n + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(values + slot, z, mask=hit & (slot < CAP))
        tl.store(places + slot, column * step, mask=hit & (slot < CAP))
        n += tl.sum(hit.to(tl.int32), 0)
    return n


@triton.jit
def count_candidates(
    z_row, BIAS, opened, best, bound, d_sae, slope_of, KIND: tl.constexpr, BIASED: tl.constexpr, TILE: tl.constexpr
):
    """How many scores of the opened groups reach the bound."""
    lane = tl.arange(0, TILE)
    hits = tl.zeros((TILE,), tl.int32)
    for start in range(0, d_sae, TILE):
        real = opened & (start + lane < d_sae)
        z = read(z_row, BIAS, start + lane, real, BIASED)
        hits += (real & reaches(z, best, bound, slope_of, KIND)).to(tl.int32)
    return tl.sum(hits, 0)


@triton.jit
def collect(
    Z, stride, BIAS, THETA, GROUPS, VALUES, PLACES, COUNTS, BEST, BOUND, d_sae, step, k, slope_of, power,
    KIND: tl.constexpr, BIASED: tl.constexpr, LINEAR: tl.constexpr, SCALAR: tl.constexpr,
    TILE: tl.constexpr, GATHER: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Candidates of a row: the first CAP of them, how many there are, the best score, and the bound they reach.

    The scores may be those of every ``step``-th latent.
    """
    row = tl.program_id(0).to(tl.int64)
    z_row = Z + row * stride
    lane = tl.arange(0, TILE)
    top = tl.full((TILE,), float("-inf"), tl.float32)
    above = tl.zeros((TILE,), tl.int32)
    for start in tl.range(0, d_sae, TILE, loop_unroll_factor=2):  # more loads under way at a time
        column = start + lane
        z = read(z_row, BIAS, column, column < d_sae, BIASED)
        top = tl.maximum(top, z, propagate_nan=tl.PropagateNan.ALL)
        if KIND == THRESHOLD:
            above += exceeds(z, THETA, power, column, column < d_sae, SCALAR).to(tl.int32)
    best = largest(top)
    reach = best
    n = 1
    if finite(best):
        bound = best
        if KIND == THRESHOLD:
            opened = above > 0
        else:
            bound = _bound(top, best, k, slope_of, power, KIND, LINEAR)
            opened = reaches(top, best, bound, slope_of, KIND)
        reach = bound
        if KIND == SIMPLEX:
            reach = best + bound / slope_of - SLACK * tl.abs(best)
        many = tl.sum(opened.to(tl.int32), 0)
        if many <= CAP:
            n = list_candidates(
                z_row, BIAS, THETA, VALUES + row * CAP, PLACES + row * CAP, GROUPS + row * CAP, opened, many, best,
                bound, power, d_sae, step, slope_of, KIND, BIASED, SCALAR, TILE, GATHER, CAP,
            )  # fmt: skip
        elif KIND == THRESHOLD:
            n = tl.sum(above, 0)
        else:
            n = count_candidates(z_row, BIAS, opened, best, bound, d_sae, slope_of, KIND, BIASED, TILE)
    else:
        tl.store(VALUES + row * CAP, best)
        tl.store(PLACES + row * CAP, odd_place(z_row, BIAS, best, d_sae, TILE, BIASED) * step)
    tl.store(BEST + row, best)
    tl.store(BOUND + row, reach)
    tl.store(COUNTS + row, n)


@triton.jit
def finish(
    Z, stride, BIAS, VALUES, COUNTS, BEST, TAU, QUOTA, SIZES, d_sae, k, slope_of, power,
    KIND: tl.constexpr, BIASED: tl.constexpr, LINEAR: tl.constexpr, TILE: tl.constexpr, CAP: tl.constexpr,
    STREAM: tl.constexpr,
):  # fmt: skip
    """The exact threshold of a row (in units of v for SIMPLEX), how many ties at it are kept, and the support size."""
    row = tl.program_id(0).to(tl.int64)
    z_row = Z + row * stride
    n = tl.load(COUNTS + row)
    best = tl.load(BEST + row)
    tau = best
    quota = n * 0
    size = n * 0 + 1
    if finite(best) & (KIND == SIMPLEX):
        if (n <= CAP) | (not STREAM):
            slot = tl.arange(0, CAP)
            z = tl.load(VALUES + row * CAP + slot, mask=slot < n, other=float("-inf"))
            v = (z - best) * slope_of
            tau = simplex_threshold(v, best * 0.0 - 1.0, power, LINEAR)
            size = tl.sum((v > tau).to(tl.int32), 0)
        else:
            tau = simplex_streamed(z_row, BIAS, best, best * 0.0 - 1.0, d_sae, slope_of, power, TILE, LINEAR, BIASED)
            size = 0
            lane = tl.arange(0, TILE)
            for start in range(0, d_sae, TILE):
                z = read(z_row, BIAS, start + lane, start + lane < d_sae, BIASED)
                size += tl.sum(((z - best) * slope_of > tau).to(tl.int32), 0)
    if finite(best) & (KIND == TOPK):
        tau = 0.0
        if n >= k:
            if (n <= CAP) | (not STREAM):
                slot = tl.arange(0, CAP)
                z = tl.load(VALUES + row * CAP + slot, mask=slot < n, other=float("-inf"))
                tau = kth(z, best, k)
                tau = tl.min(tl.where(z >= tau, z, float("inf")), 0)
                quota = k - tl.sum((z > tau).to(tl.int32), 0)
            else:
                tau = kth_streamed(z_row, BIAS, best, k, d_sae, TILE, BIASED)
                quota = k - reaching(z_row, BIAS, tau, True, d_sae, TILE, BIASED)
        size = tl.minimum(tl.load(COUNTS + row, volatile=True), k)  # read again: held in a register, it would spill
    if finite(best) & (KIND == THRESHOLD):
        size = n
    tl.store(TAU + row, tau)
    tl.store(QUOTA + row, quota)
    tl.store(SIZES + row, size)


@triton.jit
def fill(
    Z, stride, BIAS, THETA, VALUES, PLACES, COUNTS, BEST, TAU, QUOTA, OFFSETS, INDICES, SCORES,
    room, d_sae, slope_of, power,
    KIND: tl.constexpr, BIASED: tl.constexpr, SCALAR: tl.constexpr, TILE: tl.constexpr, CAP: tl.constexpr,
    STREAM: tl.constexpr,
):  # fmt: skip
    """Write the selected latents of a row, ascending, and their scores at its offset; nothing at or beyond ``room``."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(COUNTS + row)
    best = tl.load(BEST + row)
    tau = tl.load(TAU + row)
    quota = tl.load(QUOTA + row)
    out = tl.load(OFFSETS + row)
    if finite(best):
        if (n <= CAP) | (not STREAM):
            slot = tl.arange(0, CAP)
            z = tl.load(VALUES + row * CAP + slot, mask=slot < n, other=float("-inf"))
            column = tl.load(PLACES + row * CAP + slot, mask=slot < n, other=0)
            if KIND == SIMPLEX:
                kept = (z - best) * slope_of > tau
            elif KIND == TOPK:
                tie = z == tau
                kept = (z > tau) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= quota))
            else:
                kept = slot < n
            where = out + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(INDICES + where, column.to(tl.int64), mask=kept & (where < room))
            tl.store(SCORES + where, z, mask=kept & (where < room))
        else:
            lane = tl.arange(0, TILE)
            ties = 0
            for start in range(0, d_sae, TILE):
                column = start + lane
                z = read(Z + row * stride, BIAS, column, column < d_sae, BIASED)
                if KIND == SIMPLEX:
                    kept = (z - best) * slope_of > tau
                elif KIND == TOPK:
                    tie = (z == tau) & (column < d_sae)
                    kept = (z > tau) | (tie & (ties + tl.cumsum(tie.to(tl.int32), 0) <= quota))
                    ties += tl.sum(tie.to(tl.int32), 0)
                else:
                    kept = exceeds(z, THETA, power, column, column < d_sae, SCALAR)
                kept = kept & (column < d_sae)
                where = out + tl.cumsum(kept.to(tl.int32), 0) - 1
                tl.store(INDICES + where, column.to(tl.int64), mask=kept & (where < room))
                tl.store(SCORES + where, z, mask=kept & (where < room))
                out += tl.sum(kept.to(tl.int32), 0)
    else:
        tl.store(INDICES + out, tl.load(PLACES + row * CAP).to(tl.int64), mask=out < room)
        tl.store(SCORES + out, best, mask=out < room)
