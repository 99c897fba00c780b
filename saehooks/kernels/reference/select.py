"""Selection in plain torch: correct on any device and dtype, what the other backends are measured against.

Rows whose largest score is not finite (NaN, +inf, or all -inf) select exactly the latent `argmax` names, so that
they stay visible as NaN or infinity downstream and never widen a support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from saehooks.errors import ConfigError
from saehooks.kernels.memory import reusable_empty
from saehooks.kernels.reference.across_rows import ScoresOfLatents, batch_topk, feature_choice
from saehooks.kernels.rules import (
    BatchRule,
    BatchTopK,
    Entmax,
    FeatureChoice,
    RowRule,
    Sparsemax,
    Threshold,
    TopK,
)
from saehooks.kernels.step import DEFAULT, Step
from saehooks.precision import widened
from saehooks.support import Support, offsets_of, rows_of

GROUP = 64
"""Scores in a group whose maximum bounds the threshold; smaller for small dictionaries."""


SCORE_BYTES = 256 * 2**20
"""Most memory a chunk of scores takes."""

CPU_SCORE_BYTES = 128 * 2**20
"""The same on CPU, where larger chunks are no faster."""

SelectRows = Callable[[Tensor, RowRule, Step], Support]


def select_products(
    queries: Tensor,
    keys: Tensor,
    rule: RowRule | BatchRule,
    bias: Tensor | None = None,
    step: Step = DEFAULT,
    by_row: SelectRows | None = None,
) -> Support:
    """Support of the scores ``queries @ keys.T + bias``, made in chunks and selected from; they are never all kept.

    Args:
        queries, keys, bias: (rows, d), (d_sae, d), (d_sae,) or None.
        rule: which scores are selected.
        step: what the kernels know beside these.
        by_row: selects from a chunk of scores by a row rule; None for `select_rows`.
    """
    rows, d_sae = queries.shape[0], keys.shape[0]
    if isinstance(rule, BatchTopK):
        return batch_topk(score_chunks(queries, keys, bias), rule.k * rows, rows, d_sae, keys.device)
    if isinstance(rule, FeatureChoice):
        block = max(1, SCORE_BYTES // max(1, rows * _wide(queries).element_size()))
        return feature_choice(_scores_of_latents(queries, keys, bias), rule.budgets, rows, block)
    one = by_row or select_rows
    return join([one(scores, rule, step) for scores in score_chunks(queries, keys, bias)], keys)


def _scores_of_latents(queries: Tensor, keys: Tensor, bias: Tensor | None) -> ScoresOfLatents:
    queries = _wide(queries.detach())

    def scores(start: int, stop: int) -> Tensor:
        part = queries @ _wide(keys[start:stop].detach()).T
        return part if bias is None else part + bias[start:stop].detach().to(part.dtype)

    return scores


@torch.no_grad()
def score_chunks(queries: Tensor, keys: Tensor, bias: Tensor | None = None) -> Iterator[Tensor]:
    """Dense scores (chunk, d_sae) of consecutive rows, in one buffer that the next chunk overwrites.

    Half-precision inputs are scored in float32: rounding scores before selection costs up to 2% of the result.
    """
    queries, keys = _wide(queries.detach()), _wide(keys.detach())
    rows, d_sae = queries.shape[0], keys.shape[0]
    on_cpu = queries.device.type == "cpu" and queries.dtype == torch.float32
    room = (CPU_SCORE_BYTES if on_cpu else SCORE_BYTES) // max(1, d_sae * queries.element_size())
    chunks = -(-rows // max(1, room))
    step = -(-rows // max(1, chunks))
    buffer = reusable_empty(step, d_sae) if on_cpu else queries.new_empty(step, d_sae)
    for start in range(0, rows, max(1, step)):
        part = queries[start : start + step]
        scores = buffer[: part.shape[0]]
        if bias is None:
            torch.mm(part, keys.T, out=scores)
        else:
            torch.addmm(bias.detach().to(scores.dtype), part, keys.T, out=scores)
        yield scores


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def join(parts: list[Support], like: Tensor) -> Support:
    """One Support of the rows of several, in order; (0,) and on the device of ``like`` when there are none."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        nothing = torch.zeros(0, dtype=torch.int64, device=like.device)
        return Support(nothing, nothing.new_zeros(1), like.new_zeros(0))
    indices, sizes, threshold = zip(*((p.indices, p.offsets.diff(), p.threshold) for p in parts), strict=True)
    known = [part.scores for part in parts if part.scores is not None]
    scores = torch.cat(known) if len(known) == len(parts) else None
    return Support(torch.cat(indices), offsets_of(torch.cat(sizes)), torch.cat(threshold), scores)


def select_rows(scores: Tensor, rule: RowRule, step: Step = DEFAULT) -> Support:
    """Support of given scores (rows, d_sae) by a row rule."""
    if isinstance(rule, Threshold):
        return _support(scores > rule.theta, scores, _per_row(rule.theta, scores))
    if isinstance(rule, TopK):
        return _select_topk(scores, rule.k)
    if isinstance(rule, Sparsemax):
        return _select_simplex(scores, 2.0)
    if isinstance(rule, Entmax):
        return _select_simplex(scores, rule.alpha)
    raise ConfigError(f"no kernel selects row by row by {rule!r}")


def _per_row(theta: Tensor | float, scores: Tensor) -> Tensor:
    lowest = theta.min() if isinstance(theta, Tensor) else torch.tensor(theta)
    return lowest.to(scores).expand(scores.shape[0])


def _support(mask: Tensor, scores: Tensor, threshold: Tensor) -> Support:
    """Support from a dense mask; rows without a finite maximum keep their argmax alone, which is their threshold."""
    if scores.shape[1] and scores.shape[0]:
        best, place = scores.max(dim=1)
        broken = ~best.isfinite()
        if broken.any():
            mask = mask & ~broken[:, None]
            mask[broken, place[broken]] = True
            threshold = torch.where(broken, best, threshold)
    rows, indices = mask.nonzero(as_tuple=True)
    return Support(indices, offsets_of(mask.sum(1)), threshold, scores[rows, indices])


def _select_topk(scores: Tensor, k: int) -> Support:
    """Of scores equal to the k-th largest, the first ones, so that every path agrees."""
    smallest = scores.topk(k, dim=1).values[:, -1].clamp(min=0)
    above, equal = scores > smallest[:, None], (scores == smallest[:, None]) & (scores > 0)
    equal &= equal.cumsum(1) <= k - above.sum(1, keepdim=True)
    return _support(above | equal, scores, smallest)


def _select_simplex(scores: Tensor, alpha: float) -> Support:
    """Entmax support, sparsemax for alpha = 2: group maxima bound tau from below, so only scores above it can be in."""
    rows, d_sae = scores.shape
    if rows == 0 or d_sae == 0:
        return Support(
            scores.new_zeros(0, dtype=torch.int64),
            scores.new_zeros(rows + 1, dtype=torch.int64),
            scores.new_zeros(rows),
        )
    best, place = scores.max(dim=1)
    finite = best.isfinite()
    shift = torch.where(finite, best, 0.0)
    bound = entmax_threshold(_group_maxima(scores) - shift[:, None], alpha).to(scores.dtype)
    # A hair below the bound: rounding it to the dtype of the scores must not lose a candidate.
    slack = torch.finfo(scores.dtype).eps * (shift.abs() + bound.abs() + 1)
    mask = (scores >= (shift + bound - slack)[:, None]) & finite[:, None]
    mask[~finite, place[~finite]] = True
    _, indices = mask.nonzero(as_tuple=True)
    sizes = mask.sum(1)
    del mask
    offsets = offsets_of(sizes)
    entry = rows_of(offsets, indices.numel())
    shifted = widened(scores[entry, indices]) - widened(shift[entry])
    tau = entmax_threshold(padded(shifted, entry, offsets), alpha)
    keep = (shifted > tau[entry]) | ~finite[entry]
    sizes = torch.zeros_like(sizes).index_add_(0, entry, keep.long())
    threshold = torch.where(finite, tau + shift, best).to(scores.dtype)
    return Support(indices[keep], offsets_of(sizes), threshold, scores[entry[keep], indices[keep]])


def padded(values: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """(rows, largest row) of compressed rows, filled up with -inf."""
    out = values.new_full((offsets.numel() - 1, int(offsets.diff().max())), -torch.inf)
    out[rows, torch.arange(values.numel(), device=values.device) - offsets[rows]] = values
    return out


def _group_maxima(scores: Tensor) -> Tensor:
    """Maxima of strided groups (column mod the number of groups): neighbours, often alike, fall into different ones."""
    rows, d_sae = scores.shape
    group = min(GROUP, max(1, d_sae // 64))
    groups = d_sae // group
    head = scores[:, : groups * group].reshape(rows, group, groups).amax(1)
    return head if groups * group == d_sae else torch.cat([head, scores[:, groups * group :]], dim=1)


def simplex_threshold(scores: Tensor) -> Tensor:
    """(rows,) float64 tau of sparsemax by sorting, for (rows, n) scores shifted so that their maximum is 0."""
    ordered = widened(scores).sort(dim=1, descending=True).values
    rank = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=ordered.dtype)
    excess = ordered.cumsum(1) - 1.0
    # Padding is -inf: its cumulative sum is -inf and 1 + r * -inf > -inf is False, as wanted.
    size = (rank * ordered > excess).sum(1).clamp(min=1)
    return excess.gather(1, size[:, None] - 1)[:, 0] / size


def entmax_threshold(scores: Tensor, alpha: float) -> Tensor:
    """(rows,) float64 score above which alpha-entmax is positive, for (rows, n) scores whose maximum is 0.

    Newton's rule on ``sum of max((alpha - 1) (s - t), 0)^(1 / (alpha - 1)) = 1``: the sum is convex and falls with t,
    so from below each step stays below the root and none overshoots.
    Source: Peters et al. 2019, arXiv:1905.05702.
    """
    if alpha == 2:
        return simplex_threshold(scores)
    power, scores = 1 / (alpha - 1), widened(scores) * (alpha - 1)
    tau = scores.new_full((scores.shape[0],), -1.0)
    for _ in range(100):
        above = (scores - tau[:, None]).clamp(min=0)
        slope = above.pow(power - 1)
        step = ((slope * above).sum(1) - 1) / (power * slope.sum(1))
        tau = tau + step.clamp(min=0)
        if not (step > 1e-15).any():
            break
    return tau * power
