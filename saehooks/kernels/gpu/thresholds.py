"""Exact thresholds of one row inside a Triton kernel: of scores in registers, or of a row read again for each step."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finite(x):
    return x - x == 0.0


@triton.jit
def read(Z_ROW, BIAS, column, mask, BIASED: tl.constexpr):
    """Scores of one row as float32, -inf where masked."""
    z = tl.load(Z_ROW + column, mask=mask, other=float("-inf")).to(tl.float32)
    if BIASED:
        z += tl.load(BIAS + column, mask=mask, other=0.0)
    return z


@triton.jit
def _sums(v, tau, power, LINEAR: tl.constexpr):
    """What a Newton step needs of some scores: how many lie above tau, their sum, and of their weights and slopes."""
    inside = v > tau
    count = tl.sum(inside.to(tl.float32), 0)
    if LINEAR:
        total = tl.sum(tl.where(inside, v, 0.0), 0)
        weight = total
        slope = total
    else:
        gap = tl.where(inside, v - tau, 1.0)
        each = tl.where(inside, tl.exp2((power - 1.0) * tl.log2(gap)), 0.0)
        slope = tl.sum(each, 0)
        weight = tl.sum(each * gap, 0)
        total = slope
    return count, total, weight, slope


@triton.jit
def _raised(tau, count, total, weight, slope, power, before, steps, LINEAR: tl.constexpr):
    """tau after one Newton step from below (for sparsemax it is Michelot's rule), and whether to take another."""
    if LINEAR:
        ahead = (total - 1.0) / count
        going = (ahead > tau) & (count != before)
    else:
        ahead = tau + (weight - 1.0) / (power * slope)
        going = (ahead > tau) & (steps < 64)
    return tl.maximum(tau, ahead), going


@triton.jit
def simplex_threshold(v, tau, power, LINEAR: tl.constexpr):
    """The threshold of scores (n,) whose maximum is 0, from a lower bound of it; absent ones are -inf."""
    before = -1.0
    steps = 0
    going = True
    while going:
        count, total, weight, slope = _sums(v, tau, power, LINEAR)
        steps += 1
        tau, going = _raised(tau, count, total, weight, slope, power, before, steps, LINEAR)
        before = count
    return tau


@triton.jit
def simplex_streamed(
    z_row, BIAS, best, tau, d_sae, slope_of, power, TILE: tl.constexpr, LINEAR: tl.constexpr, BIASED: tl.constexpr
):
    """`simplex_threshold` of a whole row, read again for each step."""
    lane = tl.arange(0, TILE)
    before = -1.0
    steps = 0
    going = True
    while going:
        count = 0.0
        total = 0.0
        weight = 0.0
        slope = 0.0
        for start in range(0, d_sae, TILE):
            z = read(z_row, BIAS, start + lane, start + lane < d_sae, BIASED)
            one, two, three, four = _sums((z - best) * slope_of, tau, power, LINEAR)
            count += one
            total += two
            weight += three
            slope += four
        steps += 1
        tau, going = _raised(tau, count, total, weight, slope, power, before, steps, LINEAR)
        before = count
    return tau


@triton.jit
def topk_bound(top, best, k):
    """A positive number that at least k of the group maxima reach, or 0."""
    low = 0.0
    high = best
    steps = 0
    going = tl.sum((top > 0.0).to(tl.int32), 0) > k
    while going:
        middle = low + (high - low) * 0.5
        count = tl.sum((top >= middle).to(tl.int32), 0)
        enough = count >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        steps += 1
        going = (steps < 24) & ((count < k) | (count > k + k // 4))
    return low


@triton.jit
def kth(v, best, k):
    """The k-th largest of positive scores (n,), exactly: bisection on their bits, which order as they do."""
    bits = v.to(tl.int32, bitcast=True)
    low = tl.sum((v > 0.0).to(tl.int32), 0) * 0
    high = best.to(tl.int32, bitcast=True) + 1
    going = True
    while going:
        middle = low + (high - low) // 2
        count = tl.sum((bits >= middle).to(tl.int32), 0)
        enough = count >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        going = (high - low > 1) & (count != k)
    return low.to(tl.float32, bitcast=True)


@triton.jit
def reaching(z_row, BIAS, least, strictly, d_sae, TILE: tl.constexpr, BIASED: tl.constexpr):
    """How many scores of a row reach, or exceed, a positive number."""
    lane = tl.arange(0, TILE)
    count = 0
    for start in range(0, d_sae, TILE):
        z = read(z_row, BIAS, start + lane, start + lane < d_sae, BIASED)
        reached = tl.where(strictly, z > least, z >= least)
        count += tl.sum(reached.to(tl.int32), 0)
    return count


@triton.jit
def kth_streamed(z_row, BIAS, best, k, d_sae, TILE: tl.constexpr, BIASED: tl.constexpr):
    """`kth` of a whole row, read again for each step; it does not stop early, so it is a score of the row."""
    high = best.to(tl.int32, bitcast=True) + 1
    low = high * 0
    going = True
    while going:
        middle = low + (high - low) // 2
        count = reaching(z_row, BIAS, middle.to(tl.float32, bitcast=True), False, d_sae, TILE, BIASED)
        enough = count >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        going = high - low > 1
    return low.to(tl.float32, bitcast=True)
