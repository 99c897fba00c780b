"""Triton kernels that select across rows, without a sort and without the host: the largest scores of a whole batch.

`maxima` reads the scores once and keeps the maxima of each row's groups of strided columns. As many maxima as there are
matches to give out bound the threshold from below, so `gather` lists only scores that reach the bound, from groups that
do; rows with more than CAP of them are streamed again wherever they are asked. The threshold itself is found digit by
digit: `tally_maxima` and `tally_rows` count how often each digit follows the digits so far, `descend` chooses. Floats
are compared by their bits, which for positive ones order as they do. Counts are integers, so their atomics are exact
and the result has one order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saehooks.kernels.gpu.launch import BatchPlan, batch_plan
from saehooks.kernels.gpu.select import (
    TOPK,
    Candidates,
    Cut,
    RuleNumbers,
    Target,
    count_candidates,
    largest,
    list_candidates,
    nonfinite_place,
    write,
)
from saehooks.kernels.gpu.thresholds import finite, read
from saehooks.kernels.step import DEFAULT, Step
from saehooks.support import Support

BINS = tl.constexpr(256)
"""Values of a digit: 8 bits."""


@triton.jit
def maxima_kernel(Z, stride, BIAS, MAXIMA, BEST, d_sae, BIASED: tl.constexpr, TILE: tl.constexpr):
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
def tally_maxima_kernel(
    MAXIMA, COUNTS, PREFIX, groups, share, SHIFT: tl.constexpr, FOLD: tl.constexpr, BLOCK: tl.constexpr
):
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
def descend_kernel(COUNTS, PREFIX, RANK, CLAMP: tl.constexpr):
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
def gather_kernel(
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
        tl.store(PLACES + row * CAP, nonfinite_place(z_row, BIAS, best, d_sae, TILE, BIASED))
    tl.store(COUNTS + row, n)


@triton.jit
def tally_rows_kernel(
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
def count_rows_kernel(
    Z, stride, BIAS, VALUES, LISTED, BEST, TAU, ABOVE, TIES, d_sae,
    BIASED: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many scores of a row exceed the threshold of the batch, and equal it; one not finite has its argmax."""
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


# ------------------------------------------------------------------------ host

DIGITS = (24, 16, 8, 0)
"""Where each 8-bit digit of a positive float32 ends."""

BOUND_DIGITS = 2
"""Digits of the bound: 7 bits of the mantissa, so at most 1/128 too low, which adds a few candidates."""


def select_batch(
    scores: Tensor, rule: RuleNumbers, bias: Tensor | None = None, step: Step = DEFAULT, plan: BatchPlan | None = None
) -> Support:
    """The ``k * rows`` largest scores of all rows together, positive ones only; of equals the first.

    Args:
        scores: (rows, d_sae), not empty, fewer than 2^31 of them, rows contiguous.
        rule: top-k with the mean number of latents of a row.
        bias: (d_sae,) float32 added to the scores, or None.
        step: whose capacity is filled, if it has one.
        plan: how the kernels are launched, if not as `batch_plan` says.
    Returns:
        Support as from `batch_topk`, with the scores.
    """
    plan = plan or batch_plan(scores.shape[1], rule.k)
    rows = scores.shape[0]
    found = _candidates(scores, bias, rule.k * rows, plan)
    tau, left = _smallest(scores, bias, found, rule.k * rows, plan)
    above, ties = torch.empty_like(found.counts), torch.empty_like(found.counts)
    count_rows_kernel[(rows,)](
        scores, scores.stride(0), scores if bias is None else bias, found.values, found.counts, found.best, tau,
        above, ties, scores.shape[1],
        BIASED=bias is not None, CAP=plan.select.cap, BLOCK=plan.block, num_warps=plan.warps,
    )  # fmt: skip
    # Scores that equal the smallest are selected in the first rows, as many as those above it leave.
    quota = torch.minimum(ties, (left - ties.cumsum(0) + ties).clamp(min=0)).int()
    cut = Cut(tau.expand(rows).contiguous(), quota, above + quota)
    room = step.capacity
    target = None if room is None else Target.of(room, scores.device)
    support = write(found, cut, rule, plan.select, scores, bias, target)
    support = support.with_threshold(torch.where(cut.tau > 0, cut.tau, torch.inf))
    return support if room is None or target is None else target.whole([support], room)


def _candidates(scores: Tensor, bias: Tensor | None, total: int, plan: BatchPlan) -> Candidates:
    """What may be selected of each row; the bound is the same for all of them."""
    (rows, d_sae), shape = scores.shape, plan.select
    made: dict[str, Any] = {"device": scores.device, "dtype": torch.float32}
    maxima, best = torch.empty(rows, shape.tile, **made), torch.empty(rows, **made)
    source = (scores, scores.stride(0), scores if bias is None else bias)
    shared: dict[str, Any] = {"BIASED": bias is not None, "TILE": shape.tile, "num_warps": shape.collect_warps}
    maxima_kernel[(rows,)](*source, maxima, best, d_sae, **shared)
    counts, prefix, rank = _search(total, scores.device)
    groups = maxima.numel() // plan.fold
    for level, shift in enumerate(DIGITS[:BOUND_DIGITS]):
        tally_maxima_kernel[(-(-groups // plan.share),)](
            maxima, counts[level], prefix, groups, plan.share, SHIFT=shift, FOLD=plan.fold, BLOCK=plan.block,
            num_warps=plan.warps,
        )  # fmt: skip
        descend_kernel[(1,)](counts[level], prefix, rank, CLAMP=False, num_warps=1)
    values = torch.empty(rows, shape.cap, **made)
    places, listed = torch.empty_like(values, dtype=torch.int32), torch.empty_like(best, dtype=torch.int32)
    gather_kernel[(rows,)](
        *source, maxima, prefix, torch.empty_like(places), values, places, listed, best, d_sae,
        SHIFT=DIGITS[BOUND_DIGITS - 1], GATHER=shape.gather, CAP=shape.cap, **shared,
    )  # fmt: skip
    return Candidates(values, places, listed, best, best)


def _smallest(
    scores: Tensor, bias: Tensor | None, found: Candidates, total: int, plan: BatchPlan
) -> tuple[Tensor, Tensor]:
    """(1,) the smallest score that is selected, 0 if none is, and (1,) how many that equal it are."""
    counts, prefix, rank = _search(total, scores.device)
    for level, shift in enumerate(DIGITS):
        tally_rows_kernel[(scores.shape[0],)](
            scores, scores.stride(0), scores if bias is None else bias, found.values, found.counts, found.best,
            counts[level], prefix, scores.shape[1],
            SHIFT=shift, BIASED=bias is not None, CAP=plan.select.cap, BLOCK=plan.block, num_warps=plan.warps,
        )  # fmt: skip
        descend_kernel[(1,)](counts[level], prefix, rank, CLAMP=True, num_warps=1)
    return prefix.view(torch.float32), rank


def _search(rank: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of the digits at each level, the digits found so far (none), and the rank that is looked for."""
    counts = torch.zeros(len(DIGITS), BINS.value, dtype=torch.int32, device=device)
    prefix = torch.zeros(1, dtype=torch.int32, device=device)
    return counts, prefix, torch.full_like(prefix, rank)
