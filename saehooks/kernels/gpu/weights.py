"""Triton kernels of the entmax probabilities of given supports: a program owns a row, so every sum has one order.

Numbers are float64, as on the other paths: the threshold of a row of large scores needs them. Half precision comes and
goes by way of float32, since Triton's interpreter knows no other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saehooks.kernels import reference
from saehooks.kernels.gpu.launch import on
from saehooks.kernels.gpu.thresholds import finite

ENTRIES = 128
"""Entries of a row handled at a time, by one warp."""


def center(values: Tensor, offsets: Tensor, total: float) -> Tensor:
    """(nnz,) values shifted by a constant in each row, so that the row sums to ``total``; 0 for padding."""
    if values.dtype == torch.float64:
        return reference.center(values, offsets, total)
    values = values.contiguous()
    out = torch.zeros_like(values)
    with on(values, offsets):
        if out.numel() and offsets.numel() > 1:
            center_kernel[(offsets.numel() - 1,)](values, offsets, out, total, ENTRIES=128, num_warps=1)
    return out


def entmax_weights(scores: Tensor, offsets: Tensor, alpha: Tensor) -> Tensor:
    """(nnz,) float64 probabilities of compressed rows of scores, alpha a scalar on their device; 0 for padding."""
    if scores.dtype == torch.float64:
        return reference.entmax_weights(scores, offsets, alpha)
    scores = scores.contiguous()
    out = torch.zeros_like(scores, dtype=torch.float64)
    with on(scores, offsets, alpha):
        if out.numel() and offsets.numel() > 1:
            weights_kernel[(offsets.numel() - 1,)](scores, offsets, alpha, out, ENTRIES=ENTRIES, num_warps=1)
    return out


def entmax_gradient(
    weights: Tensor, grad: Tensor, offsets: Tensor, alpha: Tensor, learned: bool
) -> tuple[Tensor, Tensor]:
    """(nnz,) gradient of the scores, in the dtype of ``grad``, and () float64 of alpha, 0 unless it is learned."""
    if grad.dtype == torch.float64:
        return reference.entmax_gradient(weights, grad, offsets, alpha, learned)
    grad = grad.contiguous()
    out = torch.zeros_like(grad)
    shares = weights.new_zeros(offsets.numel() - 1)
    with on(weights, grad, offsets, alpha):
        if out.numel() and shares.numel():
            gradient_kernel[(shares.numel(),)](
                weights, grad, offsets, alpha, out, shares, LEARNED=learned, ENTRIES=ENTRIES, num_warps=1
            )
    return out, shares.sum()


# ---------------------------------------------------------------- Triton kernels

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _power(x, exponent):
    """``x ** exponent`` where x is positive, else 0."""
    return tl.where(x > 0, tl.exp2(exponent * tl.log2(tl.where(x > 0, x, 1.0))), 0.0)


@triton.jit
def weights_kernel(SCORES, OFFSETS, ALPHA, OUT, ENTRIES: tl.constexpr):
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
def gradient_kernel(WEIGHTS, GRAD, OFFSETS, ALPHA, OUT, D_ALPHA, LEARNED: tl.constexpr, ENTRIES: tl.constexpr):
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


@triton.jit
def center_kernel(VALUES, OFFSETS, OUT, total, ENTRIES: tl.constexpr):
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
