"""Every kernel in plain torch: correct on any device and dtype, the yardstick of the fast paths.

Rows whose largest score is not finite (NaN, +inf, or all -inf) select exactly the latent `argmax` names, so that
they stay visible as NaN or infinity downstream and never widen a support.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saehooks.codes import offsets_of, rows_of
from saehooks.errors import ConfigError
from saehooks.kernels.rules import Entmax, RowRule, Sparsemax, Support, Threshold, TopK

GROUP = 64
"""Scores in a group whose maximum bounds the threshold; smaller for small dictionaries."""

CHUNK_BYTES = 64 * 2**20
"""Most memory a temporary of gathered rows may take."""


def select(scores: Tensor, rule: RowRule) -> Support:
    """Select from given scores (rows, d_sae) by a row rule."""
    if isinstance(rule, Threshold):
        return _support(scores > rule.theta, scores, _per_row(rule.theta, scores))
    if isinstance(rule, TopK):
        return _select_topk(scores, rule.k)
    if isinstance(rule, Sparsemax):
        return _select_simplex(scores, 2.0)
    if isinstance(rule, Entmax):
        return _select_simplex(scores, rule.alpha)
    raise ConfigError(f"no kernel selects by {rule!r}")


def _per_row(theta: Tensor | float, scores: Tensor) -> Tensor:
    lowest = theta.min() if isinstance(theta, Tensor) else torch.tensor(theta)
    return lowest.to(scores).expand(scores.shape[0])


def _support(mask: Tensor, scores: Tensor, threshold: Tensor) -> Support:
    """Support from a dense mask; rows without a finite maximum keep their argmax alone, which is their threshold."""
    if scores.shape[1] and scores.shape[0]:
        best, place = scores.max(dim=1)
        odd = ~best.isfinite()
        if odd.any():
            mask = mask & ~odd[:, None]
            mask[odd, place[odd]] = True
            threshold = torch.where(odd, best, threshold)
    rows, indices = mask.nonzero(as_tuple=True)
    return Support(indices, offsets_of(mask.sum(1)), threshold, scores[rows, indices])


def _select_topk(scores: Tensor, k: int) -> Support:
    """Of scores equal to the k-th largest, the first ones, so that every path agrees."""
    check_k(k, scores.shape[1])
    smallest = scores.topk(k, dim=1).values[:, -1].clamp(min=0)
    above, equal = scores > smallest[:, None], (scores == smallest[:, None]) & (scores > 0)
    equal &= equal.cumsum(1) <= k - above.sum(1, keepdim=True)
    return _support(above | equal, scores, smallest)


def check_k(k: int, d_sae: int) -> None:
    """Raise ConfigError if there are fewer than k latents."""
    if k > d_sae:
        raise ConfigError(f"top-k with k={k} needs at least that many latents, this SAE has {d_sae}")


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
    shifted = scores[entry, indices].double() - shift[entry].double()
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
    ordered = scores.double().sort(dim=1, descending=True).values
    rank = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=torch.float64)
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
    power, scores = 1 / (alpha - 1), scores.double() * (alpha - 1)
    tau = scores.new_full((scores.shape[0],), -1.0)
    for _ in range(100):
        above = (scores - tau[:, None]).clamp(min=0)
        slope = above.pow(power - 1)
        step = ((slope * above).sum(1) - 1) / (power * slope.sum(1))
        tau = tau + step.clamp(min=0)
        if not (step > 1e-15).any():
            break
    return tau * power


def sddmm(left: Tensor, table: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    """(nnz,) products ``left[row] . table[index]`` of the sampled entries; left (rows, d), table (d_sae, d)."""
    rows = rows_of(offsets, indices.numel())
    out = left.new_empty(indices.numel())
    step = _entries(left)
    for start in range(0, indices.numel(), step):
        part = slice(start, start + step)
        torch.sum(left[rows[part]] * table[indices[part]], dim=1, out=out[part])
    return out


def spmm(values: Tensor, indices: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """(rows, d) sums ``values @ table[indices]`` of each compressed row."""
    rows = offsets.numel() - 1
    if not indices.numel():
        return table.new_zeros(rows, table.shape[1])
    return F.embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=values.to(table.dtype), include_last_offset=True
    )


def spmm_transposed(values: Tensor, indices: Tensor, offsets: Tensor, left: Tensor, d_sae: int) -> Tensor:
    """(d_sae, d) gradient of a table: row ``i`` sums ``value * left[row]`` over the entries with index ``i``."""
    rows = rows_of(offsets, indices.numel())
    out = left.new_zeros(d_sae, left.shape[1])
    step = _entries(left)
    for start in range(0, indices.numel(), step):
        part = slice(start, start + step)
        out.index_add_(0, indices[part], left[rows[part]] * values[part, None].to(left.dtype))
    return out


def _entries(left: Tensor) -> int:
    return max(1, CHUNK_BYTES // max(1, left.shape[1] * left.element_size()))
