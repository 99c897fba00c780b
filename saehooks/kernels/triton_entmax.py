"""Triton kernels of the entmax probabilities of given supports: a program owns a row, so every sum has one order.

Numbers are float64, as on the other paths: the threshold of a row of large scores needs them. Half precision comes and
goes by way of float32, since Triton's interpreter knows no other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saehooks.kernels.triton_thresholds import finite

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _power(x, exponent):
    """``x ** exponent`` where x is positive, else 0."""
    return tl.where(x > 0, tl.exp2(exponent * tl.log2(tl.where(x > 0, x, 1.0))), 0.0)


@triton.jit
def weights(SCORES, OFFSETS, ALPHA, OUT, ENTRIES: tl.constexpr):
    """The probabilities of one row's entries; NaN where the largest score is not finite."""
    row = tl.program_id(0)
    start = tl.load(OFFSETS + row)
    stop = tl.load(OFFSETS + row + 1)
    slope_of = tl.load(ALPHA).to(tl.float64) - 1.0
    power = 1.0 / slope_of
    top = tl.full((ENTRIES,), float("-inf"), tl.float64)
    for first in range(start, stop, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        z = tl.load(SCORES + entry, mask=entry < stop, other=float("-inf")).to(tl.float32).to(tl.float64)
        top = tl.where((z > top) | (z != z), z, top)  # a NaN stays
    nan = tl.sum((top != top).to(tl.int32), 0) > 0
    best = tl.where(nan, float("nan"), tl.max(tl.where(top == top, top, float("-inf")), 0))
    tau = best * 0.0 - 1.0
    steps = 0
    going = finite(best)
    while going:
        mass = best * 0.0
        slope = best * 0.0
        for first in range(start, stop, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)
            z = tl.load(SCORES + entry, mask=entry < stop, other=float("-inf")).to(tl.float32).to(tl.float64)
            gap = (z - best) * slope_of - tau
            each = _power(gap, power - 1.0)
            mass += tl.sum(tl.where(each > 0, each * gap, 0.0), 0)
            slope += tl.sum(each, 0)
        ahead = (mass - 1.0) / (power * slope)
        tau += tl.where(ahead > 0, ahead, 0.0)
        steps += 1
        going = (ahead > 1e-15) & (steps < 100)
    for first in range(start, stop, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        z = tl.load(SCORES + entry, mask=entry < stop, other=float("-inf")).to(tl.float32).to(tl.float64)
        tl.store(OUT + entry, _power((z - best) * slope_of - tau, power) + tau * 0.0, mask=entry < stop)


@triton.jit
def gradient(WEIGHTS, GRAD, OFFSETS, ALPHA, OUT, D_ALPHA, LEARNED: tl.constexpr, ENTRIES: tl.constexpr):
    """The gradient of one row's scores and, where alpha is learned, the row's share of alpha's.

    Source: Correia et al. 2019, arXiv:1909.00015, Prop. 1.
    """
    row = tl.program_id(0)
    start = tl.load(OFFSETS + row)
    stop = tl.load(OFFSETS + row + 1)
    alpha = tl.load(ALPHA).to(tl.float64)
    slopes = tl.zeros((ENTRIES,), tl.float64)
    pulls = tl.zeros((ENTRIES,), tl.float64)
    surprises = tl.zeros((ENTRIES,), tl.float64)
    for first in range(start, stop, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        weight = tl.load(WEIGHTS + entry, mask=entry < stop, other=0.0)
        grad = tl.load(GRAD + entry, mask=entry < stop, other=0.0).to(tl.float32).to(tl.float64)
        slope = _power(weight, 2.0 - alpha)
        slopes += slope
        pulls += slope * grad
        surprises += _surprise(weight)
    total = tl.sum(slopes, 0)
    pull = tl.sum(pulls, 0)
    surprise = tl.sum(surprises, 0)
    shares = tl.zeros((ENTRIES,), tl.float64)
    for first in range(start, stop, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        weight = tl.load(WEIGHTS + entry, mask=entry < stop, other=0.0)
        grad = tl.load(GRAD + entry, mask=entry < stop, other=0.0).to(tl.float32).to(tl.float64)
        slope = _power(weight, 2.0 - alpha)
        skewed = slope / total
        found = slope * grad - skewed * pull
        tl.store(OUT + entry, found.to(tl.float32).to(OUT.dtype.element_ty), mask=entry < stop)
        if LEARNED:
            change = (weight - skewed) / (alpha - 1.0) - (_surprise(weight) - skewed * surprise)
            shares += tl.where(entry < stop, grad * change / (alpha - 1.0), 0.0)
    if LEARNED:
        tl.store(D_ALPHA + row, tl.sum(shares, 0))


@triton.jit
def _surprise(weight):
    """``weight * log(weight)``, 0 for a weight of 0."""
    return tl.where(weight > 0, weight * tl.log2(tl.where(weight > 0, weight, 1.0)) * LN2, 0.0)
