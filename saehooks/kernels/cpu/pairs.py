"""Selection among pairs of factors, of float32 on CPU: whole heads are left out, and factors of the rest made exactly.

A pair's score is ``sqrt(p q)``. The largest score of each head bounds the row's threshold from below; only heads whose
largest reaches that bound are looked into, and there only factors that reach it beside the largest of the other side.

Through the screen (see `screen`) the factors of all heads are products in bfloat16: as small as they can be they bound
the threshold, as large as they can be they say which are candidates, and those alone are multiplied in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from saehooks.kernels.cpu import screen
from saehooks.kernels.cpu.numba_jit import numba_jit
from saehooks.kernels.cpu.products import MIN_REUSE, sddmm_rows, serves, tile_rows
from saehooks.kernels.cpu.screen import (
    ROUNDING,
    Rounded,
    bfloat16_number,
    rounded_keys,
    rounded_queries,
    rounding_errors,
)
from saehooks.kernels.cpu.select import RULES, gathered, select_rows
from saehooks.kernels.cpu.thresholds import (
    THRESHOLD,
    TOPK,
    described,
    kth_largest,
    settle,
    simplex_threshold,
)
from saehooks.kernels.memory import reusable_empty
from saehooks.kernels.reference import pairs as reference
from saehooks.kernels.reference.select import CPU_SCORE_BYTES, join
from saehooks.kernels.rules import BatchTopK, RowRule, Threshold
from saehooks.kernels.step import DEFAULT, Step
from saehooks.support import Support, offsets_of

SLACK = 1e-5
"""Relative room below a bound of a product of two factors, so that rounding loses no candidate."""
BATCH = 256
"""Rows whose candidates are multiplied together."""


def select_pairs(p: Tensor, q: Tensor, rule: RowRule | BatchTopK, step: Step = DEFAULT) -> Support:
    """Support of the pairs of given factors (rows, heads, m) and (rows, heads, n)."""
    if not (_loops_know(rule) and serves(p) and serves(q) and p.numel() and q.numel()):
        return reference.select_pairs(p, q, rule, step, select_rows)
    first, second = (factor.detach().contiguous().numpy() for factor in (p, q))
    found, undecided = _selected(_Given(first, second), rule)
    if not undecided.numel():
        return found
    rest = reference.select_pairs(p[undecided], q[undecided], rule, step, select_rows)
    return screen.merged(found, rest, undecided)


def select_pair_products(
    queries: Tensor, first: Tensor, second: Tensor, heads: int, rule: RowRule | BatchTopK, step: Step = DEFAULT
) -> Support:
    """Support of the pairs whose factors are rectified products of queries (rows, d) with first (heads * m, d) and
    second (heads * n, d)."""
    queries, first, second = queries.detach().contiguous(), first.detach(), second.detach()
    if not (_loops_know(rule) and all(map(serves, (queries, first, second))) and queries.numel()):
        return reference.select_pair_products(queries, first, second, heads, rule, step, select_rows)
    most = max(1, CPU_SCORE_BYTES // (4 * (len(first) + len(second))))
    parts = queries.split(math.ceil(len(queries) / math.ceil(len(queries) / most)))
    exactly = lambda part: _exact(part, first, second, heads, rule, step)  # noqa: E731
    if not _screen_pays(queries, first, second, step):
        return join([exactly(part) for part in parts], first)
    rounded = []
    for name, table in (("first", first), ("second", second)):
        kept = None if table.is_inference() else step.screen_tables  # those do not say whether they changed
        rounded.append(rounded_keys(table, None) if kept is None else kept.of(table, None, rounded_keys, name=name))
        rounded[-1].reused = kept is not None
    found = join([_screened(part, (first, second), rounded, heads, rule, exactly) for part in parts], first)
    if screen.MODE == "check":
        _compare(found, join([exactly(part) for part in parts], first), queries, first, second, heads)
    return found


def _loops_know(rule: RowRule | BatchTopK) -> TypeGuard[RowRule]:
    """Whether the loops select by a rule; pairs whose score is 0 they do not see."""
    return isinstance(rule, RULES) and not (
        isinstance(rule, Threshold) and bool((torch.as_tensor(rule.theta) < 0).any())
    )


def _screen_pays(queries: Tensor, first: Tensor, second: Tensor, step: Step) -> bool:
    screen.check_mode()
    if screen.MODE == "off" or not (first.is_contiguous() and second.is_contiguous()):
        return False
    factors, kept = len(first) + len(second), step.screen_tables is not None
    return screen.MODE is not None or screen.is_faster(len(queries), factors, first.shape[1], kept, by_row=False)


def _exact(queries: Tensor, first: Tensor, second: Tensor, heads: int, rule: RowRule, step: Step) -> Support:
    """Support by float32 products of all factors."""
    p, q = (
        torch.mm(queries, table.T, out=reusable_empty(len(queries), len(table))).relu_().unflatten(1, (heads, -1))
        for table in (first, second)
    )
    return select_pairs(p, q, rule, step)


def _screened(
    queries: Tensor,
    tables: Sequence[Tensor],
    rounded: Sequence[Rounded],
    heads: int,
    rule: RowRule,
    exactly: Callable[[Tensor], Support],
) -> Support:
    """Support through the screen; rows that it cannot decide are selected exactly."""
    half = rounded_queries(queries)
    p_errors, q_errors = (rounding_errors(half, one) for one in rounded)
    if p_errors is None or q_errors is None:
        return exactly(queries)
    p, q = (one.scores(half.table).reshape(len(queries), heads, -1) for one in rounded)
    first, second = (table.numpy() for table in tables)
    support, undecided = _selected(_Rounded(p, q, p_errors, q_errors, queries.numpy(), first, second), rule)
    return screen.merged(support, exactly(queries[undecided]), undecided) if undecided.numel() else support


class _Given(NamedTuple):
    """Factors of all rows."""

    p: np.ndarray
    """(rows, heads, m) float32."""
    q: np.ndarray
    """(rows, heads, n)."""


class _Rounded(NamedTuple):
    """Factors rounded to bfloat16, and what exact ones are made of."""

    p: np.ndarray
    """(rows, heads, m) int16, the bits of the rounded products."""
    q: np.ndarray
    p_errors: np.ndarray
    """(rows,) float32, the most that a product of the row is off, before it is rounded."""
    q_errors: np.ndarray
    queries: np.ndarray
    first: np.ndarray
    second: np.ndarray


def _selected(job: _Given | _Rounded, rule: RowRule) -> tuple[Support, Tensor]:
    """Support of all rows, and those among them (n,) that the loops could not decide, which are empty in it."""
    (rows, heads, m), n = job.p.shape, job.q.shape[2]
    d_sae = heads * m * n
    kind, k, alpha, theta = described(rule, d_sae)
    sizes = np.empty(rows, np.int64)
    thresholds = np.full(rows, float(theta.min()), np.float32)

    def select(start: int, stop: int, indices: np.ndarray, picked: np.ndarray) -> tuple[int, int]:
        out = indices, picked, sizes, thresholds
        if isinstance(job, _Given):
            return _given_range(*job, start, stop, kind, k, alpha, theta, *out)
        tiles = tile_rows(job.first), tile_rows(job.second)
        return _rounded_range(*job, start, stop, kind, k, alpha, theta, *tiles, *out)

    indices, picked = gathered(select, rows, heads * (m + n), d_sae, max(128, 2 * k))
    undecided = torch.from_numpy(sizes < 0).nonzero()[:, 0]
    offsets = offsets_of(torch.from_numpy(np.maximum(sizes, 0)))
    return Support(indices, offsets, torch.from_numpy(thresholds), picked), undecided


def _compare(found: Support, exact: Support, queries: Tensor, first: Tensor, second: Tensor, heads: int) -> None:
    """Raise InexactError where one selected what the other did not, beyond the last bits of a score."""
    m, n = len(first) // heads, len(second) // heads
    d_sae = heads * m * n
    row, latent = screen.differing(found, exact, d_sae)
    pair, j = latent // n, latent % n
    x, left, right = queries[row].double(), first[pair].double(), second[pair // m * n + j].double()
    p, q = ((x * one).sum(1).clamp(min=0) for one in (left, right))
    lost = 4 * queries.shape[1] * 2.0**-24 * x.norm(dim=1)
    # Of p q, whose square root the score is: its own error would be large at 0.
    room = lost * (left.norm(dim=1) * q + right.norm(dim=1) * p + lost * left.norm(dim=1) * right.norm(dim=1))
    distance = (p * q - exact.threshold[row].double().clamp(min=0).square()).abs()
    screen.raise_where(distance > room + 1e-6 * p * q, row, latent, (p * q).sqrt(), exact)


# ----------------------------------------------------------------------- loops


@numba_jit
def _least(tops, keys, work, kind, k, alpha, theta):
    """A product of factors that whatever can be selected reaches, from a product of each head that its best reaches.

    ``tops`` are not negative and finite; keys and work are overwritten; no threshold that a rule gives is below theta.
    """
    if kind == THRESHOLD:
        return np.float64(theta) * np.float64(theta) * (1.0 - SLACK)
    if kind == TOPK:
        if k > tops.size:
            return 0.0
        bits = tops.view(np.int32)  # of numbers that are not negative: they order alike
        for h in range(tops.size):
            keys[h] = bits[h]
        return np.float64(np.int32(kth_largest(keys, tops.size, k)).view(np.float32)) * (1.0 - SLACK)
    best = 0.0
    for h in range(tops.size):
        work[h] = np.sqrt(np.float64(tops[h]))
        best = max(best, work[h])
    for h in range(tops.size):
        work[h] -= best
    tau = best + simplex_threshold(work, tops.size, kind, alpha)
    tau = max(0.0, tau - 1.2e-7 * (best + 1.0))
    return tau * tau * (1.0 - SLACK)


@numba_jit
def _settled_row(ps, p_at, p_first, p_last, qs, q_at, q_first, q_last, m, n, least, kind, k, alpha, theta, work,
                 places, scores):  # fmt: skip
    """Select from the pairs of some factors of a row, given with their columns, ascending, in all factors of the row.

    Returns:
        How many pairs, at the front of places and scores, or -1 where these factors do not say; and the threshold.
    """
    found = 0
    a, b = p_first, q_first
    while a < p_last and b < q_last:
        head = p_at[a] // m
        if q_at[b] // n < head:
            b += 1
            continue
        if q_at[b] // n > head:
            a += 1
            continue
        end = b
        while end < q_last and q_at[end] // n == head:
            end += 1
        while a < p_last and p_at[a] // m == head:
            for j in range(b, end):
                product = ps[a] * qs[j]
                if product >= least and product > np.float32(0.0):
                    places[found] = p_at[a] * n + (q_at[j] - head * n)
                    scores[found] = np.sqrt(product)
                    if not scores[found] < np.inf:
                        return -1, 0.0
                    found += 1
            a += 1
        b = end
    if kind != TOPK and kind != THRESHOLD and found == 0:
        return -1, 0.0
    size, threshold = settle(scores, places, found, work, kind, k, alpha, theta)
    if kind != TOPK and kind != THRESHOLD and threshold < 0.0:
        return -1, 0.0  # pairs whose score is 0 are selected, too
    return size, threshold


@numba_jit
def _keep(size, threshold, r, kind, places, scores, used, indices, picked, sizes, thresholds):
    """Note what a row selected; return how many entries there are now."""
    sizes[r] = size
    if size < 0:
        return used
    for j in range(size):
        indices[used + j] = places[j]
        picked[used + j] = scores[j]
    if kind != THRESHOLD:
        thresholds[r] = threshold
    return used + size


@numba_jit
def _given_range(p, q, start, stop, kind, k, alpha, theta, indices, picked, sizes, thresholds):
    """Select rows start to stop, until indices and picked are full; the size of a row that is not decided is -1.

    Returns:
        The first row that was not done, and how many entries were written.
    """
    heads, m, n = p.shape[1], p.shape[2], q.shape[2]
    d_sae = heads * m * n
    tops, keys = np.empty(heads, np.float32), np.empty(heads, np.int32)
    best_p, best_q = np.empty(heads, np.float32), np.empty(heads, np.float32)
    work, places, scores = np.empty(d_sae, np.float64), np.empty(d_sae, np.int32), np.empty(d_sae, np.float32)
    ps, p_at = np.empty(heads * m, np.float32), np.empty(heads * m, np.int32)
    qs, q_at = np.empty(heads * n, np.float32), np.empty(heads * n, np.int32)
    used = 0
    for r in range(start, stop):
        if used + d_sae > indices.size:
            return r, used
        total = np.float32(0.0)
        for h in range(heads):
            a = b = np.float32(0.0)
            for i in range(m):
                a = p[r, h, i] if p[r, h, i] > a else a
                total += p[r, h, i]
            for j in range(n):
                b = q[r, h, j] if q[r, h, j] > b else b
                total += q[r, h, j]
            best_p[h] = a
            best_q[h] = b
            tops[h] = a * b
            total += tops[h]
        size, threshold = -1, 0.0
        if total - total == np.float32(0.0):  # else some factor or product is not finite
            least = _least(tops, keys, work, kind, k, alpha, thresholds[r])
            many = few = 0
            for h in range(heads):
                if tops[h] < least or tops[h] <= np.float32(0.0):
                    continue
                for i in range(m):
                    ps[many] = p[r, h, i]
                    p_at[many] = h * m + i
                    many += ps[many] * best_q[h] >= least
                for j in range(n):
                    qs[few] = q[r, h, j]
                    q_at[few] = h * n + j
                    few += qs[few] * best_p[h] >= least
            size, threshold = _settled_row(
                ps, p_at, 0, many, qs, q_at, 0, few, m, n, least, kind, k, alpha, theta, work, places, scores
            )
        used = _keep(size, threshold, r, kind, places, scores, used, indices, picked, sizes, thresholds)
    return stop, used


@numba_jit
def _largest_of_heads(bits, maxima):
    """Fill maxima (heads,) with the largest bits of each head's factors (heads, m), or 0 where none is positive."""
    maxima[:] = 0
    for i in range(bits.shape[1]):
        for h in range(maxima.size):
            maxima[h] = bits[h, i] if bits[h, i] > maxima[h] else maxima[h]


@numba_jit
def _rounded_range(
    p16, q16, p_errors, q_errors, queries, first, second, start, stop, kind, k, alpha, theta, p_tile, q_tile,
    indices, picked, sizes, thresholds,
):  # fmt: skip
    """As `_given_range`, of rounded factors: those that may be part of a selected pair are multiplied anew, in batches
    of rows, a tile of a table at a time. A batch is written whole or not at all."""
    heads, m, n = p16.shape[1], p16.shape[2], q16.shape[2]
    d_sae = heads * m * n
    tops, keys = np.empty(heads, np.float32), np.empty(heads, np.int32)
    best_p, best_q = np.empty(heads, np.int16), np.empty(heads, np.int16)
    work, places, scores = np.empty(d_sae, np.float64), np.empty(d_sae, np.int32), np.empty(d_sae, np.float32)
    batch = min(BATCH, stop - start)
    room_p, room_q = max(m, heads * m // 6), max(n, heads * n // 6)
    p_at, q_at = np.empty(batch * room_p + heads * m, np.int32), np.empty(batch * room_q + heads * n, np.int32)
    ps, qs = np.empty(p_at.size, np.float32), np.empty(q_at.size, np.float32)
    p_offsets, q_offsets, least_of = np.zeros(batch + 1, np.int64), np.zeros(batch + 1, np.int64), np.zeros(batch)
    used = 0
    for begin in range(start, stop, batch):
        end = min(begin + batch, stop)
        before = used
        for r in range(begin, end):
            place = r - begin
            many, few = p_offsets[place], q_offsets[place]
            p_error, q_error = np.float64(p_errors[r]), np.float64(q_errors[r])
            sizes[r] = -1
            if p_error < np.inf and q_error < np.inf:
                _largest_of_heads(p16[r], best_p)
                _largest_of_heads(q16[r], best_q)
                for h in range(heads):
                    a = np.float64(bfloat16_number(best_p[h])) * (1.0 - ROUNDING) - p_error
                    b = np.float64(bfloat16_number(best_q[h])) * (1.0 - ROUNDING) - q_error
                    tops[h] = np.float32(a * b) if a > 0.0 and b > 0.0 else np.float32(0.0)
                least = _least(tops, keys, work, kind, k, alpha, thresholds[r]) * (1.0 - SLACK)
                least_of[place] = least
                sizes[r] = 0
                for h in range(heads):
                    a = np.float64(bfloat16_number(best_p[h])) * (1.0 + ROUNDING) + p_error
                    b = np.float64(bfloat16_number(best_q[h])) * (1.0 + ROUNDING) + q_error
                    if a * b < least:
                        continue
                    for i in range(m):
                        v = np.float64(bfloat16_number(p16[r, h, i]))
                        p_at[many] = h * m + i
                        many += (v + ROUNDING * abs(v) + p_error) * b >= least
                    for j in range(n):
                        v = np.float64(bfloat16_number(q16[r, h, j]))
                        q_at[few] = h * n + j
                        few += (v + ROUNDING * abs(v) + q_error) * a >= least
                if many - p_offsets[place] > room_p or few - q_offsets[place] > room_q:
                    sizes[r] = -1
            if sizes[r] < 0:
                many, few = p_offsets[place], q_offsets[place]
            p_offsets[place + 1], q_offsets[place + 1] = many, few
        count = end - begin
        tile = p_tile if p_offsets[count] * p_tile >= MIN_REUSE * count * heads * m else heads * m
        sddmm_rows(queries[begin:end], first, p_at, p_offsets, 0, count, tile, ps)
        tile = q_tile if q_offsets[count] * q_tile >= MIN_REUSE * count * heads * n else heads * n
        sddmm_rows(queries[begin:end], second, q_at, q_offsets, 0, count, tile, qs)
        for r in range(begin, end):
            place = r - begin
            if sizes[r] < 0:
                continue
            for j in range(p_offsets[place], p_offsets[place + 1]):
                ps[j] = max(ps[j], np.float32(0.0))
            for j in range(q_offsets[place], q_offsets[place + 1]):
                qs[j] = max(qs[j], np.float32(0.0))
            size, threshold = _settled_row(
                ps, p_at, p_offsets[place], p_offsets[place + 1], qs, q_at, q_offsets[place], q_offsets[place + 1],
                m, n, least_of[place], kind, k, alpha, theta, work, places, scores,
            )  # fmt: skip
            if used + max(size, 0) > indices.size:
                return begin, before
            used = _keep(size, threshold, r, kind, places, scores, used, indices, picked, sizes, thresholds)
    return stop, used
