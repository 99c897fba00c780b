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
from saehooks.kernels.rules import RowRule, Sparsemax, Support, Threshold, TopK

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
        return _select_sparsemax(scores)
    raise ConfigError(f"no kernel selects by {rule!r}")


def _per_row(theta: Tensor | float, scores: Tensor) -> Tensor:
    lowest = theta.min() if isinstance(theta, Tensor) else torch.tensor(theta)
    return lowest.to(scores).expand(scores.shape[0])


def _support(mask: Tensor, scores: Tensor, threshold: Tensor) -> Support:
    """Support from a dense mask; rows without a finite maximum keep their argmax alone."""
    if scores.shape[1] and scores.shape[0]:
        best, place = scores.max(dim=1)
        odd = ~best.isfinite()
        if odd.any():
            mask = mask & ~odd[:, None]
            mask[odd, place[odd]] = True
    return Support(mask.nonzero(as_tuple=True)[1], offsets_of(mask.sum(1)), threshold)


def _select_topk(scores: Tensor, k: int) -> Support:
    rows, d_sae = scores.shape
    if k > d_sae:
        raise ConfigError(f"top-k with k={k} needs at least that many latents, this SAE has {d_sae}")
    values, places = scores.topk(k, dim=1)
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, places, values > 0)
    return _support(mask, scores, values[:, -1] if rows else scores.new_zeros(0))


def _select_sparsemax(scores: Tensor) -> Support:
    """Group maxima bound tau from below, so only scores above that bound can be in the support."""
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
    bound = simplex_threshold(_group_maxima(scores) - shift[:, None]).to(scores.dtype)
    # A hair below the bound: rounding it to the dtype of the scores must not lose a candidate.
    slack = torch.finfo(scores.dtype).eps * (shift.abs() + 1)
    mask = (scores >= (shift + bound - slack)[:, None]) & finite[:, None]
    mask[~finite, place[~finite]] = True
    _, indices = mask.nonzero(as_tuple=True)
    sizes = mask.sum(1)
    del mask
    offsets = offsets_of(sizes)
    entry = rows_of(offsets, indices.numel())
    shifted = scores[entry, indices] - shift[entry]
    padded = shifted.new_full((rows, int(sizes.max())), -torch.inf)
    padded[entry, torch.arange(indices.numel(), device=indices.device) - offsets[entry]] = shifted
    tau = simplex_threshold(padded)
    keep = (shifted.double() > tau[entry]) | ~finite[entry]
    sizes = torch.zeros_like(sizes).index_add_(0, entry, keep.long())
    return Support(indices[keep], offsets_of(sizes), (tau + shift).to(scores.dtype))


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
