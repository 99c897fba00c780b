"""Host side of batch top-k on the GPU: the largest scores of all rows together, found without waiting for the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saehooks.kernels import triton_batch as kernels
from saehooks.kernels.capacity import active
from saehooks.kernels.gpu_plan import BatchPlan, batch_plan
from saehooks.kernels.gpu_select import Candidates, Cut, Rule, Target, write
from saehooks.kernels.rules import Support

DIGITS = (24, 16, 8, 0)
"""Where each 8-bit digit of a positive float32 ends."""

BOUND_DIGITS = 2
"""Digits of the bound: 7 bits of the mantissa, so at most 1/128 too low, which adds a few candidates."""


def select_batch(scores: Tensor, rule: Rule, bias: Tensor | None = None, plan: BatchPlan | None = None) -> Support:
    """The ``k * rows`` largest scores of all rows together, positive ones only; of equals the first.

    Args:
        scores: (rows, d_sae), not empty, fewer than 2^31 of them, rows contiguous.
        rule: top-k with the mean number of latents of a row.
        bias: (d_sae,) float32 added to the scores, or None.
        plan: how the kernels are launched, if not as `batch_plan` says.
    Returns:
        Support as from `batch_topk`, with the scores.
    """
    plan = plan or batch_plan(scores.shape[1], rule.k)
    rows = scores.shape[0]
    found = _candidates(scores, bias, rule.k * rows, plan)
    tau, left = _smallest(scores, bias, found, rule.k * rows, plan)
    above, ties = torch.empty_like(found.counts), torch.empty_like(found.counts)
    kernels.count_rows[(rows,)](
        scores, scores.stride(0), scores if bias is None else bias, found.values, found.counts, found.best, tau,
        above, ties, scores.shape[1],
        BIASED=bias is not None, CAP=plan.select.cap, BLOCK=plan.block, num_warps=plan.warps,
    )  # fmt: skip
    # Scores that equal the smallest are selected in the first rows, as many as those above it leave.
    quota = torch.minimum(ties, (left - ties.cumsum(0) + ties).clamp(min=0)).int()
    cut = Cut(tau.expand(rows).contiguous(), quota, above + quota)
    room = active()
    target = None if room is None else Target.of(room, scores.device)
    support = write(found, cut, rule, plan.select, scores, bias, target)
    support = support._replace(threshold=torch.where(cut.tau > 0, cut.tau, torch.inf))
    return support if room is None or target is None else target.whole([support], room)


def _candidates(scores: Tensor, bias: Tensor | None, total: int, plan: BatchPlan) -> Candidates:
    """What may be selected of each row; the bound is the same for all of them."""
    (rows, d_sae), shape = scores.shape, plan.select
    made: dict[str, Any] = {"device": scores.device, "dtype": torch.float32}
    maxima, best = torch.empty(rows, shape.tile, **made), torch.empty(rows, **made)
    source = (scores, scores.stride(0), scores if bias is None else bias)
    shared: dict[str, Any] = {"BIASED": bias is not None, "TILE": shape.tile, "num_warps": shape.collect_warps}
    kernels.maxima[(rows,)](*source, maxima, best, d_sae, **shared)
    counts, prefix, rank = _search(total, scores.device)
    groups = maxima.numel() // plan.fold
    for level, shift in enumerate(DIGITS[:BOUND_DIGITS]):
        kernels.tally_maxima[(-(-groups // plan.share),)](
            maxima, counts[level], prefix, groups, plan.share, SHIFT=shift, FOLD=plan.fold, BLOCK=plan.block,
            num_warps=plan.warps,
        )  # fmt: skip
        kernels.descend[(1,)](counts[level], prefix, rank, CLAMP=False, num_warps=1)
    values = torch.empty(rows, shape.cap, **made)
    places, listed = torch.empty_like(values, dtype=torch.int32), torch.empty_like(best, dtype=torch.int32)
    kernels.gather[(rows,)](
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
        kernels.tally_rows[(scores.shape[0],)](
            scores, scores.stride(0), scores if bias is None else bias, found.values, found.counts, found.best,
            counts[level], prefix, scores.shape[1],
            SHIFT=shift, BIASED=bias is not None, CAP=plan.select.cap, BLOCK=plan.block, num_warps=plan.warps,
        )  # fmt: skip
        kernels.descend[(1,)](counts[level], prefix, rank, CLAMP=True, num_warps=1)
    return prefix.view(torch.float32), rank


def _search(rank: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of the digits at each level, the digits found so far (none), and the rank that is looked for."""
    counts = torch.zeros(len(DIGITS), kernels.BINS.value, dtype=torch.int32, device=device)
    prefix = torch.zeros(1, dtype=torch.int32, device=device)
    return counts, prefix, torch.full_like(prefix, rank)
