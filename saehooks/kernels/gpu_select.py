"""Host side of selection on the GPU: from scores to candidates, from candidates to compressed rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saehooks.codes import offsets_of
from saehooks.kernels import triton_select as kernels
from saehooks.kernels.capacity import Capacity, active
from saehooks.kernels.gpu_launch import on
from saehooks.kernels.gpu_plan import SelectPlan, select_plan
from saehooks.kernels.reference import check_k
from saehooks.kernels.rules import BatchRule, BatchTopK, Entmax, RowRule, Sparsemax, Support, Threshold, TopK


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


def describe(rule: RowRule | BatchRule, d_sae: int, device: torch.device) -> Rule | None:
    """A rule in the kernels' terms, or None if they do not know it; batch top-k as top-k of each row."""
    if isinstance(rule, Sparsemax):
        return Rule(kernels.SIMPLEX.value, 0, 1.0, 1.0, None, True)
    if isinstance(rule, Entmax):
        slope = float(rule.alpha) - 1.0
        return Rule(kernels.SIMPLEX.value, 0, slope, 1.0 / slope, None, slope == 1.0)
    if isinstance(rule, TopK | BatchTopK):
        check_k(rule.k, d_sae)
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


class Cut(NamedTuple):
    """Which candidates of each row are selected."""

    tau: Tensor
    """(rows,) float32, the threshold; for sparsemax and entmax in units of v, see the kernels."""
    quota: Tensor
    """(rows,) int32, for top-k: how many that equal the threshold are kept, the first ones."""
    sizes: Tensor
    """(rows,) int32, support sizes."""


def select_scores(
    chunks: Iterable[Tensor], rule: Rule, bias: Tensor | None = None, plan: SelectPlan | None = None
) -> list[Support]:
    """Supports of consecutive rows.

    Args:
        chunks: scores (chunk, d_sae), not empty; each is done with before the next is asked for.
        rule: which are selected.
        bias: (d_sae,) float32 added to the scores, or None.
        plan: how the kernels are launched, if not as `select_plan` says.
    """
    room, parts, target = active(), [], None
    for scores in chunks:
        scores = scores if scores.stride(1) == 1 else scores.contiguous()
        shape = plan or select_plan(scores.shape[1], rule.k)
        with on(scores):
            if room is not None and target is None:
                target = Target.of(room, scores.device)
            found = collect(scores, rule, shape, bias)
            parts.append(settle(found, rule, shape, scores, bias, target=target))
    return parts if room is None or target is None else [target.whole(parts, room)]


class Target(NamedTuple):
    """Codes of fixed size that are being filled, chunk after chunk, without waiting for the GPU."""

    indices: Tensor
    """(entries,) int64."""
    scores: Tensor
    """(entries,) float32."""
    start: Tensor
    """(1,) int64, where the next chunk begins; it may lie beyond the entries."""

    @classmethod
    def of(cls, room: Capacity, device: torch.device) -> Target:
        """Nothing filled yet."""
        indices = torch.empty(room.entries, dtype=torch.int64, device=device)
        return cls(indices, torch.zeros_like(indices, dtype=torch.float32), indices.new_zeros(1))

    def whole(self, parts: list[Support], room: Capacity) -> Support:
        """The chunks as one support, cut off at the room and padded."""
        offsets = room.fit(torch.cat([parts[0].offsets[:1], *(part.offsets[1:] for part in parts)]))
        threshold = torch.cat([part.threshold for part in parts])
        return Support(_pad(self.indices, offsets), offsets, threshold, self.scores)


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
        torch.empty_like(found.places), *found, d_sae, step, rule.k, rule.slope, rule.power,
        KIND=rule.kind, BIASED=bias is not None, LINEAR=rule.linear, SCALAR=rule.theta is None,
        TILE=plan.tile, GATHER=plan.gather, CAP=plan.cap, num_warps=plan.collect_warps,
    )  # fmt: skip
    return found


def settle(
    found: Candidates,
    rule: Rule,
    plan: SelectPlan,
    scores: Tensor | None = None,
    bias: Tensor | None = None,
    target: Target | None = None,
) -> Support:
    """Support from candidates; ``scores`` are read again for rows whose list is not complete.

    Without scores a row with an incomplete list is selected from what there is: see `incomplete`. With a target the
    entries go there, and the support's offsets count from its beginning; without one, the host waits for their number.
    """
    source = found.values if scores is None else scores
    cut = Cut(torch.empty_like(found.best), torch.empty_like(found.counts), torch.empty_like(found.counts))
    kernels.finish[(source.shape[0],)](
        source, source.stride(0), source if bias is None else bias, found.values, found.counts, found.best,
        *cut, source.shape[1], rule.k, rule.slope, rule.power,
        KIND=rule.kind, BIASED=bias is not None, LINEAR=rule.linear, TILE=plan.stream, CAP=plan.cap,
        STREAM=scores is not None, num_warps=plan.finish_warps,
    )  # fmt: skip
    return write(found, cut, rule, plan, scores, bias, target)


def write(
    found: Candidates,
    cut: Cut,
    rule: Rule,
    plan: SelectPlan,
    scores: Tensor | None = None,
    bias: Tensor | None = None,
    target: Target | None = None,
) -> Support:
    """Support from candidates, of which it is known which are selected; see `settle`."""
    source = found.values if scores is None else scores
    offsets = offsets_of(cut.sizes.long())
    if target is None:
        indices = offsets.new_empty(int(offsets[-1]))
        picked = found.best.new_empty(indices.numel())
    else:
        indices, picked = target.indices, target.scores
        offsets += target.start
        target.start.copy_(offsets[-1:])
    kernels.fill[(source.shape[0],)](
        source, source.stride(0), source if bias is None else bias, found.best if rule.theta is None else rule.theta,
        found.values, found.places, found.counts, found.best, cut.tau, cut.quota, offsets, indices, picked,
        indices.numel(), source.shape[1], rule.slope, rule.power,
        KIND=rule.kind, BIASED=bias is not None, SCALAR=rule.theta is None, TILE=plan.stream, CAP=plan.cap,
        STREAM=scores is not None, num_warps=plan.finish_warps,
    )  # fmt: skip
    return Support(indices, offsets, _threshold(cut.tau, found.best, rule), picked)


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


def _pad(indices: Tensor, offsets: Tensor) -> Tensor:
    """Indices whose entries past the last row repeat the last selected latent."""
    end = offsets[-1:]
    last = torch.where(end > 0, indices[(end - 1).clamp(min=0)], 0)
    return torch.where(torch.arange(indices.numel(), device=indices.device) < end, indices, last)
