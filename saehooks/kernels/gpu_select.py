"""Host side of selection on the GPU: from scores to candidates, from candidates to compressed rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from saehooks.codes import offsets_of
from saehooks.errors import ConfigError
from saehooks.kernels import triton_select as kernels
from saehooks.kernels.capacity import active
from saehooks.kernels.gpu_launch import on
from saehooks.kernels.gpu_plan import SelectPlan, select_plan
from saehooks.kernels.rules import Entmax, RowRule, Sparsemax, Support, Threshold, TopK


class Rule(NamedTuple):
    """A rule in the kernels' terms."""

    kind: int
    k: int
    slope: float
    """What scores are multiplied with, once their maximum is subtracted."""
    power: float
    """Exponent of the weights; for a threshold that is one number, that number."""
    theta: Tensor | None
    """(d_sae,) float32 thresholds."""
    linear: bool
    """Whether the exponent is 1."""


def describe(rule: RowRule, d_sae: int, device: torch.device) -> Rule | None:
    """A rule in the kernels' terms, or None if they do not know it."""
    if isinstance(rule, Sparsemax):
        return Rule(kernels.SIMPLEX.value, 0, 1.0, 1.0, None, True)
    if isinstance(rule, Entmax):
        slope = float(rule.alpha) - 1.0
        return Rule(kernels.SIMPLEX.value, 0, slope, 1.0 / slope, None, slope == 1.0)
    if isinstance(rule, TopK):
        if rule.k > d_sae:
            raise ConfigError(f"top-k with k={rule.k} needs at least that many latents, this SAE has {d_sae}")
        return Rule(kernels.TOPK.value, rule.k, 1.0, 1.0, None, True)
    if isinstance(rule, Threshold):
        if isinstance(rule.theta, Tensor):
            theta = rule.theta.detach().to(device, torch.float32).expand(d_sae).contiguous()
            return Rule(kernels.THRESHOLD.value, 0, 1.0, 0.0, theta, True)
        return Rule(kernels.THRESHOLD.value, 0, 1.0, float(rule.theta), None, True)
    return None


class Candidates(NamedTuple):
    """What may be selected, row by row, in lists of a fixed length with their true counts."""

    values: Tensor
    """(rows, cap) float32."""
    places: Tensor
    """(rows, cap) int32."""
    counts: Tensor
    """(rows,) int32; more than cap where the list is not complete."""
    best: Tensor
    """(rows,) float32, the largest score of the row."""
    bound: Tensor
    """(rows,) float32, a score that every selected one reaches."""


def select_scores(scores: Tensor, rule: Rule, bias: Tensor | None = None) -> Support:
    """Select from scores (rows, d_sae), with a float32 bias (d_sae,) added if given; neither may be empty."""
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    plan = select_plan(scores.shape[1], rule.k)
    with on(scores):
        found = collect(scores, rule, plan, bias)
        return settle(found, rule, plan, scores, bias)


def collect(scores: Tensor, rule: Rule, plan: SelectPlan, bias: Tensor | None = None, step: int = 1) -> Candidates:
    """Candidates of each row; the scores may be those of every ``step``-th latent."""
    rows, d_sae = scores.shape
    made: dict[str, Any] = {"device": scores.device}
    found = Candidates(
        torch.empty(rows, plan.cap, dtype=torch.float32, **made),
        torch.empty(rows, plan.cap, dtype=torch.int32, **made),
        torch.empty(rows, dtype=torch.int32, **made),
        torch.empty(rows, dtype=torch.float32, **made),
        torch.empty(rows, dtype=torch.float32, **made),
    )
    kernels.collect[(rows,)](
        scores, scores.stride(0), scores if bias is None else bias, found.best if rule.theta is None else rule.theta,
        *found, d_sae, step, rule.k, rule.slope, rule.power,
        KIND=rule.kind, BIASED=bias is not None, LINEAR=rule.linear, SCALAR=rule.theta is None,
        TILE=plan.tile, CAP=plan.cap, num_warps=plan.collect_warps,
    )  # fmt: skip
    return found


def settle(
    found: Candidates, rule: Rule, plan: SelectPlan, scores: Tensor | None = None, bias: Tensor | None = None
) -> Support:
    """Support from candidates; ``scores`` are read again for rows whose list is not complete.

    Without scores a row with an incomplete list is selected from what there is: see `incomplete`.
    """
    stream = scores is not None
    source = found.values if scores is None else scores
    values, places, counts, best, _ = found
    rows, d_sae = source.shape
    tau, quota, sizes = torch.empty_like(best), torch.empty_like(counts), torch.empty_like(counts)
    start = (source, source.stride(0), source if bias is None else bias)
    shared: dict[str, Any] = {"KIND": rule.kind, "BIASED": bias is not None, "STREAM": stream}
    shared |= {"TILE": plan.stream, "CAP": plan.cap, "num_warps": plan.finish_warps}
    kernels.finish[(rows,)](
        *start, values, counts, best, tau, quota, sizes, d_sae, rule.k, rule.slope, rule.power,
        LINEAR=rule.linear, **shared,
    )  # fmt: skip
    indices, offsets = room_for(offsets_of(sizes.long()))
    picked = best.new_zeros(indices.numel())
    kernels.fill[(rows,)](
        *start, best if rule.theta is None else rule.theta, values, places, counts, best, tau, quota,
        offsets, indices, picked, indices.numel(), d_sae, rule.slope, rule.power,
        SCALAR=rule.theta is None, **shared,
    )  # fmt: skip
    return Support(pad(indices, offsets), offsets, _threshold(tau, best, rule), picked)


def incomplete(found: Candidates) -> Tensor:
    """() bool on the device: whether a row had more candidates than its list holds."""
    return (found.counts > found.values.shape[1]).any()


def _threshold(tau: Tensor, best: Tensor, rule: Rule) -> Tensor:
    """(rows,) thresholds in the units of the scores."""
    if rule.kind == kernels.TOPK.value:
        return tau
    if rule.kind == kernels.THRESHOLD.value:
        above = best.new_full((), rule.power) if rule.theta is None else rule.theta.min()
    else:
        above = best + tau / rule.slope
    return torch.where(best.isfinite(), above, best)


def room_for(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Indices to be filled and the offsets that hold in them; waits for the GPU unless a `capacity` is given."""
    room = active()
    if room is None:
        return offsets.new_empty(int(offsets[-1])), offsets
    return offsets.new_empty(room.entries), room.fit(offsets)


def pad(indices: Tensor, offsets: Tensor) -> Tensor:
    """Indices whose entries past the last row repeat the last selected latent; untouched without a capacity."""
    if active() is None or not indices.numel():
        return indices
    end = offsets[-1:]
    last = torch.where(end > 0, indices[(end - 1).clamp(min=0)], 0)
    return torch.where(torch.arange(indices.numel(), device=indices.device) < end, indices, last)
