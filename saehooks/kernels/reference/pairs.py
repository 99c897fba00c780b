"""Selection among products of two factors, without forming the products that cannot be selected.

A row's score of pair (i, j) in a head is ``sqrt(p_i q_j)``. The largest score of each head is known from the largest
p and q (where heads are few: all pairs with one of these); they bound the threshold of the whole row from below. Only
heads that reach the bound are opened, and there every p descends the sorted q only as far as the product reaches it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from saehooks.kernels.reference.across_rows import largest
from saehooks.kernels.reference.select import SCORE_BYTES, SelectRows, entmax_threshold, padded, select_rows
from saehooks.kernels.rules import BatchTopK, Entmax, RowRule, Sparsemax, Threshold, TopK
from saehooks.kernels.step import DEFAULT, Step
from saehooks.support import Support, offsets_of, rows_of

SLACK = 1e-5
"""Relative room below a bound, so that rounding loses no candidate."""


MANY_HEADS = 64
"""From so many heads on, their largest scores alone bound the threshold well enough."""


@dataclass(frozen=True, eq=False)
class Factors:
    """Non-negative factors of all rows; the largest of each head are found once."""

    p: Tensor
    """(rows, heads, m)."""
    q: Tensor
    """(rows, heads, n)."""

    @cached_property
    def best_p(self) -> Tensor:
        """(rows, heads) the largest of each head; NaN where one is."""
        return self.p.amax(2)

    @cached_property
    def best_q(self) -> Tensor:
        """(rows, heads)."""
        return self.q.amax(2)

    @property
    def d_sae(self) -> int:
        """Number of pairs."""
        return self.p.shape[1] * self.p.shape[2] * self.q.shape[2]


class Pairs(NamedTuple):
    """Candidate pairs of each row, in compressed sparse rows."""

    rows: Tensor
    """(nnz,) int64 ascending."""
    latents: Tensor
    """(nnz,) int64, ascending inside a row."""
    scores: Tensor
    """(nnz,), positive."""
    offsets: Tensor
    """(rows + 1,) int64."""


@torch.no_grad()
def select_pair_products(
    queries: Tensor,
    first: Tensor,
    second: Tensor,
    heads: int,
    rule: RowRule | BatchTopK,
    step: Step = DEFAULT,
    by_row: SelectRows | None = None,
) -> Support:
    """`select_pairs` of rectified products of queries (rows, d) with first (heads * m, d) and second (heads * n, d)."""
    wide = queries if queries.dtype == torch.float64 else queries.float()
    p, q = ((wide @ keys.to(wide.dtype).T).relu_().unflatten(1, (heads, -1)) for keys in (first, second))
    return select_pairs(p, q, rule, step, by_row)


def select_pairs(
    p: Tensor, q: Tensor, rule: RowRule | BatchTopK, step: Step = DEFAULT, by_row: SelectRows | None = None
) -> Support:
    """Support of each row by a row rule, or of the batch by `BatchTopK`; what the explicit products would give.

    Args:
        p, q: (rows, heads, m) and (rows, heads, n), not negative.
        rule: which pairs are selected.
        step: what the kernels know beside these.
        by_row: selects by a row rule from the scores of rows of which everything is selected; None for `select_rows`.
    """
    factors = Factors(p, q)
    rows, d_sae = p.shape[0], factors.d_sae
    finite = (factors.best_p * factors.best_q).isfinite().all(1)
    usable = factors
    if not bool(finite.all()):
        usable = Factors(*(factor.masked_fill(~finite[:, None, None], 0.0) for factor in (factors.p, factors.q)))
    if isinstance(rule, BatchTopK):
        pairs = pairs_above(usable, _batch_bound(usable, rule.k * rows))
        keep, threshold = _best_of_batch(pairs, rule.k * rows, rows)
        full = torch.zeros_like(finite)
    else:
        pairs = pairs_above(usable, _row_bound(usable, rule))
        keep, threshold, full = _by_row(pairs, rule, rows, d_sae)
    places = (pairs.rows * d_sae + pairs.latents)[keep & ~full[pairs.rows]]
    broken = (~finite).nonzero()[:, 0]
    place, score = _nonfinite_places(factors, broken)
    if not isinstance(rule, BatchTopK):
        threshold = threshold.index_put((broken,), score.to(threshold))
    extra = [broken * d_sae + place]
    if bool((full & finite).any()):
        everywhere = (full & finite).nonzero()[:, 0]
        whole = (by_row or select_rows)(explicit(factors, everywhere), rule, step)  # type: ignore[arg-type]
        extra.append(everywhere[rows_of(whole.offsets, whole.indices.numel())] * d_sae + whole.indices)
        threshold = threshold.index_put((everywhere,), whole.threshold)
    places = torch.cat([places, *extra]).sort().values
    row = places // d_sae
    return Support(places - row * d_sae, offsets_of(torch.bincount(row, minlength=rows)), threshold)


def pairs_above(factors: Factors, bound: Tensor) -> Pairs:
    """The pairs of each row whose score exceeds its bound (rows,), found by descending each head's sorted q."""
    p, q = factors.p, factors.q
    heads, m, n = p.shape[1], p.shape[2], q.shape[2]
    floor = (bound.clamp(min=0) * (1 - SLACK)).square()
    best = factors.best_p * factors.best_q
    row, head = ((best >= floor[:, None]) & (best > 0)).nonzero(as_tuple=True)
    p, (q, order) = p[row, head], q[row, head].sort(dim=1, descending=True)
    least = torch.where(p > 0, floor[row, None] / p, torch.inf).clamp(min=torch.finfo(p.dtype).tiny)
    depth = torch.searchsorted(-q, -least, right=True)
    starts = offsets_of(depth.reshape(-1))
    source = rows_of(starts, int(starts[-1]))
    place = torch.arange(source.numel(), device=p.device) - starts[source]
    opened, i = source // m, source % m
    scores = (p.reshape(-1)[source] * q.reshape(-1)[opened * n + place]).sqrt()
    flat = ((row * heads + head)[opened] * m + i) * n + order.reshape(-1)[opened * n + place]
    flat, by = flat.sort()
    found = flat // (heads * m * n)
    sizes = torch.bincount(found, minlength=bound.numel())
    return Pairs(found, flat - found * (heads * m * n), scores[by], offsets_of(sizes))


def explicit(factors: Factors, rows: Tensor) -> Tensor:
    """(len(rows), d_sae) all scores of some rows: for rows that select everything."""
    p, q = factors.p[rows], factors.q[rows]
    return (p[:, :, :, None] * q[:, :, None, :]).sqrt().flatten(1)


def _tops(factors: Factors) -> Tensor:
    """(rows, heads) the largest score of each head."""
    return (factors.best_p * factors.best_q).sqrt()


def _edges(factors: Factors) -> Tensor:
    """(rows, heads * (m + n)) scores of the pairs with a head's largest p or largest q, none twice (-inf instead)."""
    p, q = factors.p, factors.q
    best_p, best_q = p.max(2, keepdim=True).values, q.max(2, keepdim=True)
    along_q = (best_p * q).sqrt().scatter(2, best_q.indices, -torch.inf)
    return torch.cat([(p * best_q.values).sqrt(), along_q], dim=2).flatten(1)


def _row_bound(factors: Factors, rule: RowRule) -> Tensor:
    """(rows,) a score below which no pair of the row can be selected, or 0."""
    rows = factors.p.shape[0]
    if isinstance(rule, Threshold):
        theta = rule.theta.min() if isinstance(rule.theta, Tensor) else torch.tensor(rule.theta)
        return theta.to(factors.p).clamp(min=0).expand(rows)
    heads = factors.p.shape[1]
    tops = _tops(factors) if heads >= (rule.k if isinstance(rule, TopK) else MANY_HEADS) else _edges(factors)
    if isinstance(rule, TopK):
        real = tops.shape[1] if tops.shape[1] == heads else tops.shape[1] - heads
        return factors.p.new_zeros(rows) if rule.k > real else tops.topk(rule.k, dim=1).values[:, -1]
    best = tops.max(1).values
    tau = entmax_threshold(tops - best[:, None], rule.alpha if isinstance(rule, Entmax) else 2.0)
    return (tau.to(best) + best - 2 * torch.finfo(best.dtype).eps * (best + tau.abs().to(best))).clamp(min=0)


def _batch_bound(factors: Factors, total: int) -> Tensor:
    """(rows,) a score below which no pair of the batch can be among the ``total`` largest."""
    rows = factors.p.shape[0]
    edges = _edges(factors).flatten()
    if total > edges.numel() - rows * factors.p.shape[1] or not total:
        return factors.p.new_zeros(rows)
    return edges.topk(total, sorted=False).values.min().clamp(min=0).expand(rows)


def _best_of_batch(pairs: Pairs, total: int, rows: int) -> tuple[Tensor, Tensor]:
    keep = torch.ones_like(pairs.rows, dtype=torch.bool)
    if pairs.scores.numel() > total:
        keep = torch.zeros_like(keep)
        keep[largest(pairs.scores, total)] = True  # pairs are in the order of rows and latents
    chosen = pairs.scores[keep]
    lowest = chosen.min() if chosen.numel() else pairs.scores.new_tensor(torch.inf)
    return keep, lowest.expand(rows)


def _by_row(pairs: Pairs, rule: RowRule, rows: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which candidates a rule keeps, its threshold in each row, and the rows that select zeros too: everything."""
    if isinstance(rule, Threshold):
        theta = rule.theta if isinstance(rule.theta, Tensor) else pairs.scores.new_tensor(rule.theta)
        theta = theta.to(pairs.scores)
        lowest = theta.min().expand(rows)
        own = theta[pairs.latents] if theta.dim() else theta
        return pairs.scores > own, lowest, lowest < 0
    if not pairs.scores.numel():
        below = -1.0 if isinstance(rule, Sparsemax | Entmax) else 0.0
        threshold = pairs.scores.new_full((rows,), below)
        return torch.zeros_like(pairs.rows, dtype=torch.bool), threshold, threshold < 0
    table = padded(pairs.scores, pairs.rows, pairs.offsets)
    if isinstance(rule, TopK):
        table = table.clamp(min=0.0)
        table = torch.nn.functional.pad(table, (0, max(0, rule.k - table.shape[1])))
    else:
        # A row without any positive pair is one of all zeros: give it one, and its tau comes out negative.
        table[pairs.offsets.diff() == 0, 0] = 0.0
    found = select_rows(table, rule)
    chosen = torch.zeros_like(table, dtype=torch.bool)
    chosen[rows_of(found.offsets, found.indices.numel()), found.indices] = True
    place = torch.arange(pairs.rows.numel(), device=pairs.rows.device) - pairs.offsets[pairs.rows]
    full = found.threshold < 0 if isinstance(rule, Sparsemax | Entmax) else torch.zeros_like(found.threshold) > 0
    return chosen[pairs.rows, place], found.threshold, full


def _nonfinite_places(factors: Factors, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows (n,) that are not finite: the pair that explicit scores would select, and its score."""
    if not rows.numel():
        return rows, factors.p.new_zeros(0)
    parts = rows.split(max(1, SCORE_BYTES // (factors.d_sae * factors.p.element_size())))
    best = [explicit(factors, part).max(1) for part in parts]
    return torch.cat([one.indices for one in best]), torch.cat([one.values for one in best])
