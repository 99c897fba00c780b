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

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saehooks.kernels import reference
from saehooks.kernels.gpu.launch import SelectPlan, on, select_plan
from saehooks.kernels.gpu.thresholds import (
    finite,
    kth,
    kth_streamed,
    reaching,
    read,
    simplex_streamed,
    simplex_threshold,
    topk_bound,
)
from saehooks.kernels.rules import BatchRule, BatchTopK, Entmax, RowRule, Sparsemax, Threshold, TopK
from saehooks.kernels.step import DEFAULT, Capacity, Step
from saehooks.support import Support, offsets_of

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
def nonfinite_place(z_row, BIAS, best, d_sae, TILE: tl.constexpr, BIASED: tl.constexpr):
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
def collect_kernel(
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
        tl.store(PLACES + row * CAP, nonfinite_place(z_row, BIAS, best, d_sae, TILE, BIASED) * step)
    tl.store(BEST + row, best)
    tl.store(BOUND + row, reach)
    tl.store(COUNTS + row, n)


@triton.jit
def finish_kernel(
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


@triton.jit(do_not_specialize=["room"])  # the number of entries, which changes with every batch
def fill_kernel(
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


# ------------------------------------------------------------------------ host


def select_rows(scores: Tensor, rule: RowRule, step: Step = DEFAULT) -> Support:
    """Support of given scores (rows, d_sae) by a row rule."""
    described = describe(rule, scores.shape[1], scores.device)
    if described is None or scores.dtype == torch.float64 or not scores.numel():
        return reference.select_rows(scores, rule)
    return select_scores([scores], described, step=step)[0]


class RuleNumbers(NamedTuple):
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


def describe(rule: RowRule | BatchRule, d_sae: int, device: torch.device) -> RuleNumbers | None:
    """A rule in the kernels' terms, or None if they do not know it; batch top-k as top-k of each row."""
    if isinstance(rule, Sparsemax):
        return RuleNumbers(SIMPLEX.value, 0, 1.0, 1.0, None, True)
    if isinstance(rule, Entmax):
        slope = float(rule.alpha) - 1.0
        return RuleNumbers(SIMPLEX.value, 0, slope, 1.0 / slope, None, slope == 1.0)
    if isinstance(rule, TopK | BatchTopK):
        return RuleNumbers(TOPK.value, rule.k, 1.0, 1.0, None, True)
    if isinstance(rule, Threshold):
        if isinstance(rule.theta, Tensor):
            theta = rule.theta.detach().to(device, torch.float32).expand(d_sae).contiguous()
            return RuleNumbers(THRESHOLD.value, 0, 1.0, 0.0, theta, True)
        return RuleNumbers(THRESHOLD.value, 0, 1.0, float(rule.theta), None, True)
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
    chunks: Iterable[Tensor],
    rule: RuleNumbers,
    bias: Tensor | None = None,
    step: Step = DEFAULT,
    plan: SelectPlan | None = None,
) -> list[Support]:
    """Supports of consecutive rows.

    Args:
        chunks: scores (chunk, d_sae), not empty; each is done with before the next is asked for.
        rule: which are selected.
        bias: (d_sae,) float32 added to the scores, or None.
        step: whose capacity is filled, if it has one.
        plan: how the kernels are launched, if not as `select_plan` says.
    """
    room, parts, target = step.capacity, [], None
    for scores in chunks:
        scores = scores if scores.stride(1) == 1 else scores.contiguous()
        shape = plan or select_plan(scores.shape[1], rule.k)
        with on(scores):
            if room is not None and target is None:
                target = Target.of(room, scores.device)
            found = collect(scores, rule, shape, bias)
            parts.append(support_of_candidates(found, rule, shape, scores, bias, target=target))
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


def collect(
    scores: Tensor, rule: RuleNumbers, plan: SelectPlan, bias: Tensor | None = None, step: int = 1
) -> Candidates:
    """Candidates of each row of scores (rows, d_sae), or of the scores of every ``step``-th latent."""
    rows, d_sae = scores.shape
    made: dict[str, Any] = {"device": scores.device}
    found = Candidates(
        torch.empty(rows, plan.cap, dtype=torch.float32, **made),
        torch.empty(rows, plan.cap, dtype=torch.int32, **made),
        torch.empty(rows, dtype=torch.int32, **made),
        torch.empty(rows, dtype=torch.float32, **made),
        torch.empty(rows, dtype=torch.float32, **made),
    )
    collect_kernel[(rows,)](
        scores, scores.stride(0), scores if bias is None else bias, found.best if rule.theta is None else rule.theta,
        torch.empty_like(found.places), *found, d_sae, step, rule.k, rule.slope, rule.power,
        KIND=rule.kind, BIASED=bias is not None, LINEAR=rule.linear, SCALAR=rule.theta is None,
        TILE=plan.tile, GATHER=plan.gather, CAP=plan.cap, num_warps=plan.collect_warps,
    )  # fmt: skip
    return found


def support_of_candidates(
    found: Candidates,
    rule: RuleNumbers,
    plan: SelectPlan,
    scores: Tensor | None = None,
    bias: Tensor | None = None,
    target: Target | None = None,
) -> Support:
    """Support from candidates; ``scores`` (rows, d_sae) are read again for rows whose list is not complete.

    Without scores a row with an incomplete list is selected from what there is: see `incomplete`. With a target the
    entries go there, and the support's offsets count from its beginning; without one, the host waits for their number.
    """
    source = found.values if scores is None else scores
    cut = Cut(torch.empty_like(found.best), torch.empty_like(found.counts), torch.empty_like(found.counts))
    finish_kernel[(source.shape[0],)](
        source, source.stride(0), source if bias is None else bias, found.values, found.counts, found.best,
        *cut, source.shape[1], rule.k, rule.slope, rule.power,
        KIND=rule.kind, BIASED=bias is not None, LINEAR=rule.linear, TILE=plan.stream, CAP=plan.cap,
        STREAM=scores is not None, num_warps=plan.finish_warps,
    )  # fmt: skip
    return write(found, cut, rule, plan, scores, bias, target)


def write(
    found: Candidates,
    cut: Cut,
    rule: RuleNumbers,
    plan: SelectPlan,
    scores: Tensor | None = None,
    bias: Tensor | None = None,
    target: Target | None = None,
) -> Support:
    """Support from candidates and what `finish` found of each row, (rows,); see `support_of_candidates`."""
    source = found.values if scores is None else scores
    offsets = offsets_of(cut.sizes.long())
    if target is None:
        indices = offsets.new_empty(int(offsets[-1]))
        picked = found.best.new_empty(indices.numel())
    else:
        indices, picked = target.indices, target.scores
        offsets += target.start
        target.start.copy_(offsets[-1:])
    fill_kernel[(source.shape[0],)](
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


def _threshold(tau: Tensor, best: Tensor, rule: RuleNumbers) -> Tensor:
    """(rows,) thresholds in the units of the scores."""
    if rule.kind == TOPK.value:
        return tau
    if rule.kind == THRESHOLD.value:
        above = best.new_full((), rule.power) if rule.theta is None else rule.theta.min()
    else:
        above = best + tau / rule.slope
    return torch.where(best.isfinite(), above, best)


def _pad(indices: Tensor, offsets: Tensor) -> Tensor:
    """Indices whose entries past the last row repeat the last selected latent."""
    end = offsets[-1:]
    last = torch.where(end > 0, indices[(end - 1).clamp(min=0)], 0)
    return torch.where(torch.arange(indices.numel(), device=indices.device) < end, indices, last)
