"""Exact selection through a bfloat16 screen: only candidates are scored in float32.

An exact selection needs exact scores of the candidates alone. Queries and keys are multiplied in bfloat16, which
AVX-512 and AMX do several times faster; the error of each row's scores is bounded; whatever may still be above the
row's threshold is a candidate, is scored in float32, and the rule is applied to those scores. The support, and the
scores up to their last bit, are those that float32 products give.

The bound, by Cauchy-Schwarz, for queries q and keys k that are rounded to q' and k':
``|q.k - q'.k'| <= |q - q'| max|k| + |q'| max|k - k'|``, plus what sums of d terms lose in float32, plus the rounding of
the score to bfloat16. Rows that are not finite, or have too many candidates (ties, the first steps of a training), are
scored in float32 as a whole: no list can overflow. Few rows go through int8, see `few_rows`.

Whether this is faster is measured once for each shape on the machine at hand. The environment variable
``SAEHOOKS_SCREEN`` says otherwise: ``on`` or ``off`` forces it (do so where two processes must agree to the last bit),
``check`` compares every selection with the exact path.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saehooks.errors import ConfigError, InexactError
from saehooks.kernels.cpu.few_rows import LARGEST, MOST_ROWS, SMALLEST, SUMMING, int8_keys, select_few
from saehooks.kernels.cpu.numba_jit import numba_jit
from saehooks.kernels.cpu.products import MIN_REUSE, dots, sddmm_rows, serves, tile_rows
from saehooks.kernels.cpu.select import RULES, gathered, parts_of, select_rows
from saehooks.kernels.cpu.threads import GRAIN, blocks, spread
from saehooks.kernels.cpu.thresholds import (
    NONE,
    THRESHOLD,
    TOPK,
    described,
    kth_largest,
    ordered_key,
    settle,
    simplex_threshold,
)
from saehooks.kernels.memory import reusable_empty
from saehooks.kernels.reference.across_rows import largest
from saehooks.kernels.reference.select import CPU_SCORE_BYTES, join
from saehooks.kernels.reference.select import select_products as select_in_chunks
from saehooks.kernels.rules import BatchRule, BatchTopK, RowRule, Sparsemax, Threshold
from saehooks.kernels.step import DEFAULT, FEW_MARKS, Step
from saehooks.support import Support, offsets_of

MODES = ("on", "off", "check")
MODE = os.environ.get("SAEHOOKS_SCREEN") or None
"""Of the whole process, if its environment says one; None: where it was measured to be faster."""

ROUNDING = 1.02 * 2.0**-8
"""Relative error of rounding to bfloat16, and a little more."""
BATCH_ENTRIES = 2**18
"""Most candidates that are scored together: the more rows they are of, the more often a tile of the keys is used."""
BLOCKS = 2
"""Blocks of rows a thread, each of which goes through the keys once."""
TILE = 32
"""Columns are padded to a multiple of this, which AMX multiplies at no cost."""
EXTRA = 3
"""Columns for the bias, its value in bfloat16 and what that leaves, and for the shift of a row."""
SHIFT = 0.95
"""Share of the threshold that is expected by which rows are shifted: what rounding a score loses grows with its size,
and scores slightly above 0 are told from those below by their sign."""
SAMPLE = 64
"""Fewest rows whose thresholds say what to expect."""
FEWEST_SCORES = 2**11
"""Fewer scores cost less than the calls that would spare them."""
FEW_ROWS = 64
"""Products of so many rows are faster from a table that was laid out for them."""
LARGE_TABLE = 128 * 2**20
"""Bytes of a copy beyond which it is not laid out a second time."""
FAR = 2.0**100
"""Biases beyond this, infinities too, count as this."""


def select_products(
    queries: Tensor, keys: Tensor, rule: RowRule | BatchRule, bias: Tensor | None = None, step: Step = DEFAULT
) -> Support:
    """Support of the scores ``queries @ keys.T + bias``, through the screen where that is faster."""
    exactly = lambda: select_in_chunks(queries, keys, rule, bias, step, by_row=select_rows)  # noqa: E731
    check_mode()
    if MODE == "off" or not _can_screen(queries, keys, rule):
        return exactly()
    kept = step.screen_tables is not None and not keys.is_inference()  # those do not say whether they changed
    by_row = not isinstance(rule, BatchTopK)
    if MODE is None and not is_faster(queries.shape[0], keys.shape[0], keys.shape[1], kept=kept, by_row=by_row):
        return exactly()
    if step.screen_tables is not None and by_row and queries.shape[0] <= MOST_ROWS:
        table = step.screen_tables.of(keys.detach(), None, int8_keys, FEW_MARKS)
        found = select_few(queries.detach(), keys.detach(), rule, bias, table) or exactly()  # type: ignore[arg-type]
    else:
        found = _screened(queries.detach(), keys.detach(), rule, bias, step)
    if MODE == "check":
        _compare(found, exactly(), queries, keys, bias)
    return found


def check_mode() -> None:
    """Raise ConfigError if the environment names no mode."""
    if MODE not in (None, *MODES):
        raise ConfigError(f"SAEHOOKS_SCREEN={MODE!r}: choose one of {', '.join(MODES)}, or leave it out")


def _can_screen(queries: Tensor, keys: Tensor, rule: RowRule | BatchRule) -> bool:
    return (
        isinstance(rule, (*RULES, BatchTopK))
        and serves(queries)
        and serves(keys)
        and queries.numel() > 0
        and keys.shape[0] >= 64
        and keys.is_contiguous()
    )


def _compare(found: Support, exact: Support, queries: Tensor, keys: Tensor, bias: Tensor | None) -> None:
    """Raise InexactError where one selected what the other did not, beyond the last bits of a score."""
    rows, d_sae = queries.shape[0], keys.shape[0]
    row, latent = differing(found, exact, d_sae)
    score = (queries.detach()[row].double() * keys.detach()[latent].double()).sum(1)
    score = score if bias is None else score + bias.detach()[latent].double()
    size = queries.detach()[row].double().norm(dim=1) * keys.detach()[latent].double().norm(dim=1)
    distance = (score - exact.threshold[row].double()).abs()
    if len(exact.threshold) == rows:
        raise_where(distance > 4 * queries.shape[1] * 2.0**-24 * (size + score.abs()), row, latent, score, exact)


def differing(found: Support, exact: Support, d_sae: int) -> tuple[Tensor, Tensor]:
    """(n,) rows and (n,) latents that one of two supports has, and the other has not."""
    mine, theirs = (one.rows * d_sae + one.indices for one in (found, exact))
    apart = torch.cat([mine[~torch.isin(mine, theirs)], theirs[~torch.isin(theirs, mine)]])
    return apart // d_sae, apart % d_sae


def raise_where(wrong: Tensor, row: Tensor, latent: Tensor, score: Tensor, exact: Support) -> None:
    """Raise InexactError for the first of some entries (n,) for which ``wrong``, (n,) bool, is set."""
    for one in wrong.nonzero()[:1, 0].tolist():
        raise InexactError(
            f"the bfloat16 screen and the exact path differ in row {int(row[one])}, latent {int(latent[one])}, score "
            f"{float(score[one]):.9g}, threshold {float(exact.threshold[row[one]]):.9g}; set SAEHOOKS_SCREEN=off"
        )


# ------------------------------------------------------------------- when it pays


@cache
def has_bfloat16_products() -> bool:
    """Whether this machine multiplies bfloat16 half as fast again as float32, or more, by a small measurement."""
    exact, half = _product_times(256, 4096, 512)
    return 1.5 * half < exact


def is_faster(rows: int, d_sae: int, d_in: int, kept: bool = False, by_row: bool = True) -> bool:
    """Whether the screen is faster for a shape; measured once for each power of two of it.

    Args:
        rows, d_sae, d_in: of the product.
        kept: whether the copy of the table is at hand; it costs as much as some 50 rows.
        by_row: whether the rule looks at one row at a time, so that few rows can be screened in int8.
    """
    if kept and by_row and rows <= MOST_ROWS:
        return rows * d_sae >= FEWEST_SCORES and _int8_is_faster(rows, min(d_sae, 8192).bit_length(), d_in)
    if d_sae < 1024 or rows * d_sae < 2**14 or (rows < 128 and not kept) or not has_bfloat16_products():
        return False
    few = kept and rows <= FEW_ROWS
    return _is_faster(min(rows, 256).bit_length(), min(d_sae, 8192).bit_length(), max(TILE, d_in), few)


@cache
def _is_faster(rows_bits: int, d_sae_bits: int, d_in: int, few: bool) -> bool:
    """Compares the two products, and allows for selecting and scoring candidates."""
    exact, half = _product_times(2 ** (rows_bits - 1), 2 ** (d_sae_bits - 1), d_in, few)
    return (1.25 if few else 1.5) * half < exact


@cache
def _int8_is_faster(rows: int, d_sae_bits: int, d_in: int) -> bool:
    """Compares both ways to select, on rows of which little is selected."""
    made = torch.Generator("cpu").manual_seed(0)
    keys = torch.randn(2 ** (d_sae_bits - 1), d_in, generator=made)
    queries, table, rule = torch.randn(rows, d_in, generator=made), int8_keys(keys), Sparsemax()
    jobs = (
        lambda: select_in_chunks(queries, keys, rule, by_row=select_rows),
        lambda: select_few(queries, keys, rule, None, table),
    )
    exact, few = _fastest(jobs)
    return 1.1 * few < exact


def _product_times(rows: int, d_sae: int, d_in: int, packed: bool = False) -> tuple[float, float]:
    """Seconds of a float32 and of a bfloat16 product: the fastest of nine, so that other programs do not count."""
    made: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    queries, keys = torch.ones(rows, d_in, **made), torch.ones(d_sae, d_in, **made)
    out, rounded = torch.empty(rows, d_sae, **made), Rounded(keys.bfloat16(), np.empty((3, 0)), reused=packed)
    half, half_out = queries.bfloat16(), out.bfloat16()
    jobs = (lambda: torch.mm(queries, keys.T, out=out), lambda: rounded.products(half, half_out))
    exact, half_time = _fastest(jobs)
    return exact, half_time


def _fastest(jobs: Sequence[Callable[[], Any]]) -> list[float]:
    """Seconds of each job, the fastest of nine in turns, so that other programs do not count."""
    found: list[list[float]] = [[] for _ in jobs]
    for _ in range(9):
        for times, job in zip(found, jobs, strict=True):
            started = time.perf_counter()
            job()
            times.append(time.perf_counter() - started)
    return [min(times) for times in found]


def describe() -> str:
    """What this machine was found to do, in a line."""
    if MODE is not None:
        return f"forced by SAEHOOKS_SCREEN={MODE}"
    if not has_bfloat16_products():
        return "off: bfloat16 products are not half as fast again as float32 ones here"
    chosen = [
        f"{rows} x {d_sae}" for rows in (1, 16, 512) for d_sae in (4096, 24576) if is_faster(rows, d_sae, 576, True)
    ]
    return f"on where it is faster, for an SAE in use (rows x latents, width 576): {', '.join(chosen) or 'nowhere'}"


# ------------------------------------------------------------------- rounded tables


@dataclass
class Rounded:
    """Rows in bfloat16, with columns for a bias and a shift, and what rounding them lost."""

    table: Tensor
    """(rows, width) bfloat16."""
    norms: np.ndarray
    """(3, rows) float32: the norm of each row, of what rounding lost of it, and of what is left."""
    bias_lost: float = 0.0
    """The most that rounding lost of a bias."""
    bias_size: float = 0.0
    """The largest bias that is not FAR."""
    reused: bool = False
    """Whether it is kept, so that laying it out once more is worth it."""
    expected: tuple[Any, float] = None, 0.0
    """The rule of the last selection, and the threshold of a query of norm 1 that most of its rows exceeded."""

    @cached_property
    def largest(self) -> tuple[float, float, float]:
        """The largest of each kind of norm."""
        norm, lost, left = self.norms.max(axis=1)
        return float(norm), float(lost), float(left)

    @cached_property
    def packed(self) -> Tensor | None:
        """The table as oneDNN lays it out for products of few rows; None for large ones, and where torch cannot."""
        if self.table.nbytes > LARGE_TABLE:
            return None
        try:
            return torch.ops.mkldnn._reorder_linear_weight(self.table, FEW_ROWS)
        except (AttributeError, RuntimeError, TypeError):
            return None

    @property
    def nbytes(self) -> int:
        """Memory that is held."""
        packed = self.__dict__.get("packed")
        return self.table.nbytes * (1 if packed is None else 2) + self.norms.nbytes

    def products(self, half: Tensor, out: Tensor) -> Tensor:
        """(n, rows) bfloat16 products of n rounded queries (n, width), in ``out`` or elsewhere."""
        if self.reused and len(half) <= FEW_ROWS and self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(half, self.packed, None, "none", [], "")
        return torch.mm(half, self.table.T, out=out)

    def scores(self, half: Tensor) -> np.ndarray:
        """(n, rows) int16, the bits of the bfloat16 products of n rounded queries (n, width)."""
        count, rows = len(half), len(self.table)
        held = reusable_empty(count, -(-rows // 2)).view(-1).view(torch.bfloat16)
        return self.products(half, held[: count * rows].view(count, rows)).view(torch.int16).numpy()


def rounded_keys(keys: Tensor, bias: Tensor | None) -> Rounded:
    """Keys (d_sae, d) in bfloat16, their bias (d_sae,) in two columns of it."""
    if bias is None or not bias.any():
        return _rounded(keys, 0, 0, MINUS_ONE)
    rounded = _rounded(keys, 0, 0, MINUS_ONE)
    near = bias.clamp(-FAR, FAR)
    high = near.to(torch.bfloat16)
    low = torch.where(near.abs() < FAR, near - high.float(), 0.0).to(torch.bfloat16)
    d = keys.shape[1]
    rounded.table[:, d], rounded.table[:, d + 1] = high, low
    lost = (near.double() - high.double() - low.double()).abs()
    close = near.abs() < FAR
    rounded.bias_lost, rounded.bias_size = (float(torch.where(close, one, 0.0).max()) for one in (lost, near.abs()))
    return rounded


def _rounded(rows: Tensor, first: int, second: int, third: int) -> Rounded:
    """Rows (n, d) in bfloat16, with three more columns of these bits, and zeros up to a multiple of TILE."""
    rows = rows.contiguous()
    n, d = rows.shape
    width = -(-(d + EXTRA) // TILE) * TILE
    table = reusable_empty(n, width // 2).view(torch.bfloat16)
    norms = np.empty((3, n), np.float32)
    bits, out = rows.numpy().view(np.int32), table.view(torch.int16).numpy()
    spread(
        lambda start, stop: _round_range(rows.numpy(), bits, out, first, second, third, norms, start, stop),
        blocks(n, max(1, GRAIN // max(1, d))),
    )
    return Rounded(table, norms)


ONE, MINUS_ONE = 0x3F80, 0x3F80 - 2**15
"""The bits of 1 and -1 in bfloat16, as int16."""


# --------------------------------------------------------------------- the screen


def _screened(queries: Tensor, keys: Tensor, rule: RowRule | BatchRule, bias: Tensor | None, step: Step) -> Support:
    """Support through the screen; rows that it cannot decide are selected exactly."""
    rows, d_sae = queries.shape[0], keys.shape[0]
    shift = None if bias is None else bias.detach().float()
    screened_rule = rule
    if isinstance(rule, Threshold) and isinstance(rule.theta, Tensor) and rule.theta.numel() > 1:
        # Above a threshold of its own is above 0, once that is subtracted.
        theta = rule.theta.detach().float().reshape(-1)
        shift, screened_rule = -theta if shift is None else shift - theta, Threshold(0.0)
    tables = step.screen_tables
    rounded = rounded_keys(keys, shift) if tables is None else tables.of(keys, shift, rounded_keys)
    rounded.reused = tables is not None
    made = rounded_queries(queries)
    errors = rounding_errors(made, rounded)
    if errors is None:
        return select_in_chunks(queries, keys, rule, bias, step, by_row=select_rows)
    norms, shifts = made.norms[0].astype(np.float64), np.zeros(rows, np.float32)
    job = _Job(queries.contiguous(), keys, rule, screened_rule, bias, rounded, made.table, norms, errors, shifts)
    if isinstance(rule, BatchTopK):
        found = _across_rows(job)
        return found or select_in_chunks(queries, keys, rule, bias, step, by_row=select_rows)
    job.shift_by_row(0)
    parts = []
    for start, stop in _chunks(rows, d_sae):
        part, undecided = _by_row(job, start, stop)
        parts.append(part)
        if undecided * 4 > stop - start and stop < rows:  # most rows have too many candidates: so will the others
            parts.append(select_in_chunks(queries[stop:], keys, rule, bias, step, by_row=select_rows))
            break
        if start == 0 and not isinstance(rule, Threshold):
            job.expect(part.threshold)
            job.shift_by_row(stop)
    return join(parts, keys)


class _Job(NamedTuple):
    """What all chunks of a selection share."""

    queries: Tensor
    keys: Tensor
    rule: RowRule | BatchRule
    screened_rule: RowRule | BatchRule
    """The rule as the screen sees it, the bias and thresholds of latents in its columns."""
    bias: Tensor | None
    rounded: Rounded
    half: Tensor
    """(rows, width) bfloat16 queries."""
    norms: np.ndarray
    """(rows,) float64 norms of the queries."""
    errors: np.ndarray
    """(rows,) float32, the most that a score of the row is off, before it is rounded to bfloat16; not finite where
    the row cannot be screened."""
    shifts: np.ndarray
    """(rows,) float32, exact in bfloat16, what is subtracted from a row's scores before they are rounded."""

    def shift_by_row(self, start: int) -> None:
        """Shift rows from start on by most of the threshold that is expected of them, which decides nothing."""
        if isinstance(self.screened_rule, Threshold):
            wanted = float(torch.as_tensor(self.screened_rule.theta))
            self._shift(start, np.full(len(self.norms) - start, wanted))
        else:
            rule, threshold = self.rounded.expected
            with np.errstate(invalid="ignore", over="ignore"):
                self._shift(start, (SHIFT * threshold if rule == self.rule else 0.0) * self.norms[start:])

    def shift_all(self, by: float) -> None:
        """Shift all rows by the same, about."""
        self._shift(0, np.full(len(self.norms), by))

    def _shift(self, start: int, by: np.ndarray) -> None:
        by = np.nan_to_num(by, posinf=0.0, neginf=0.0)
        usable = np.isfinite(self.errors[start:]) & (np.abs(by) > SMALLEST) & (np.abs(by) < FAR)
        column = self.half[start:, self.queries.shape[1] + 2]
        column.copy_(torch.from_numpy(np.where(usable, by, 0.0)))
        self.shifts[start:] = column.float().numpy()
        lost = self.half.shape[1] * SUMMING * np.abs(self.shifts[start:])
        self.errors[start:] = (self.errors[start:] + lost) * (1 + 1e-6)

    def expect(self, thresholds: Tensor) -> None:
        """Note the thresholds of the first rows: what to expect of others."""
        first = thresholds.numel()
        ratio = thresholds.numpy() / np.maximum(self.norms[:first], SMALLEST)
        ratio = ratio[np.isfinite(ratio) & np.isfinite(self.errors[:first])]
        if len(ratio) >= SAMPLE:
            self.rounded.expected = self.rule, max(0.0, float(np.quantile(ratio, 0.05)))

    def scores(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, d_sae) int16, the bits of the bfloat16 scores of some rows."""
        return self.rounded.scores(self.half[start:stop])


def _chunks(rows: int, d_sae: int) -> list[tuple[int, int]]:
    """Ranges of rows whose scores fit; a small one first, which says whether rows can be decided at all."""
    most = max(1, CPU_SCORE_BYTES // (2 * d_sae))
    first = min(most, max(SAMPLE, rows // 8) if rows >= 4 * SAMPLE else rows)
    ranges, start = [(0, first)], first
    count = max(1, -(-(rows - first) // most))
    size = max(1, -(-(rows - first) // count))
    while start < rows:
        ranges.append((start, min(start + size, rows)))
        start += size
    return ranges


def rounded_queries(queries: Tensor) -> Rounded:
    """Queries (rows, d) in bfloat16, with columns that add a key's bias."""
    return _rounded(queries, ONE, ONE, 0)


def rounding_errors(queries: Rounded, keys: Rounded) -> np.ndarray | None:
    """(rows,) float32, the most that a product of a row with a key is off, before it is rounded itself; infinite where
    the row cannot be screened. None if no row can."""
    key, key_lost, key_left = keys.largest
    if not (SMALLEST < key < LARGEST and key_left < LARGEST):
        return None
    whole, lost, left = (norm.astype(np.float64) for norm in queries.norms)
    width = keys.table.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):
        errors = (lost * key + left * key_lost) * (1 + 1e-3) + width * SUMMING * (left * key_left + whole * key)
        errors += keys.bias_lost + width * SUMMING * keys.bias_size + 1e-16 * (whole + left + key) + 1e-34
        errors = np.where((whole > SMALLEST) & (whole < LARGEST), errors * (1 + 1e-6), np.inf)
    return errors.astype(np.float32)


def _group_count(d_sae: int, k: int) -> int:
    """Number of strided groups: enough for k of them, and for few scores to share one with a candidate."""
    return min(d_sae, max(d_sae // 16, 512, 2 * k))


def _room(d_sae: int, k: int) -> int:
    """Candidates from which on a row is cheaper to score as a whole."""
    return max(64 + 2 * k, d_sae // 12)


def _by_row(job: _Job, start: int, stop: int) -> tuple[Support, int]:
    """Support of a range of rows by a row rule, and how many of them had to be selected exactly."""
    d_sae, count = job.keys.shape[0], stop - start
    kind, k, alpha, theta = described(job.screened_rule, d_sae)  # type: ignore[arg-type]
    _, _, _, own_theta = described(job.rule, d_sae)  # type: ignore[arg-type]
    scores, groups, room = job.scores(start, stop), _group_count(d_sae, k), _room(d_sae, k)
    tile = tile_rows(job.keys)
    sizes = np.empty(count, np.int64)
    thresholds = np.full(count, float(own_theta.min()), np.float32)
    arrays = (
        scores, job.queries[start:stop].numpy(), job.keys.numpy(), _array(job.bias), job.errors[start:stop],
        job.shifts[start:stop],
    )  # fmt: skip

    def select(first: int, last: int, indices: np.ndarray, picked: np.ndarray) -> tuple[int, int]:
        return _screen_range(
            *arrays, first, last, kind, k, alpha, theta[0], own_theta, groups, room, tile, indices, picked,
            sizes, thresholds,
        )  # fmt: skip

    indices, picked = gathered(select, count, d_sae, room, max(128, 2 * k), BLOCKS)
    undecided = torch.from_numpy(sizes < 0).nonzero()[:, 0]
    decided = torch.from_numpy(np.maximum(sizes, 0))
    support = Support(indices, offsets_of(decided), torch.from_numpy(thresholds), picked)
    if undecided.numel():
        exact = select_in_chunks(job.queries[start:stop][undecided], job.keys, job.rule, job.bias, by_row=select_rows)
        support = merged(support, exact, undecided)
    return support, undecided.numel()


def merged(support: Support, exact: Support, rows: Tensor) -> Support:
    """The support with other rows' entries in place of rows (n,) that are empty in it."""
    row = torch.cat([support.rows, rows[exact.rows]])
    order = row.sort(stable=True).indices
    sizes = support.offsets.diff().index_copy(0, rows, exact.offsets.diff())
    threshold = support.threshold.index_copy(0, rows, exact.threshold.float())
    scores = None
    if exact.scores is not None and support.scores is not None:
        scores = torch.cat([support.scores, exact.scores])[order]
    return Support(torch.cat([support.indices, exact.indices])[order], offsets_of(sizes), threshold, scores)


def _across_rows(job: _Job) -> Support | None:
    """Support of all rows together, `BatchTopK`; None if a row cannot be screened, or too much may be selected."""
    rows, d_sae, k = job.queries.shape[0], job.keys.shape[0], job.rule.k  # type: ignore[union-attr]
    total, groups = k * rows, _group_count(d_sae, 2 * k)
    if not np.isfinite(job.errors).all() or total > rows * groups:
        return None
    maxima = np.empty((rows, groups), np.float32)
    (_, sample), *chunks = _chunks(rows, d_sae)
    if chunks:
        _fill_maxima(job, 0, sample, maxima)
        job.shift_all(SHIFT * max(0.0, _value_of_rank(_bits(maxima[:sample]), k * sample)))
        chunks[0] = 0, chunks[0][1]
    else:
        chunks = [(0, rows)]
    for start, stop in chunks:
        scores = _fill_maxima(job, start, stop, maxima)
    bound = max(-float(job.shifts[0]), _value_of_rank(_bits(maxima), total))
    most = max(2 * total, rows * _room(d_sae, k))
    found, sizes, used = [], np.zeros(rows, np.int64), 0
    for start, stop in chunks:
        if len(chunks) > 1:  # the scores were made over by later chunks
            scores = job.scores(start, stop)
        arrays = scores, job.queries[start:stop].numpy(), job.keys.numpy(), _array(job.bias), job.errors[start:stop]

        def select(first: int, last: int, *out: np.ndarray, arrays=arrays, start=start) -> tuple[int, int]:
            return _reach_range(*arrays, first, last, np.float32(bound), groups, *out, sizes[start:])

        def work(first: int, last: int, select=select) -> list[tuple[np.ndarray, np.ndarray]]:
            return parts_of(select, first, last, d_sae, max(128, 4 * k))

        for parts in spread(work, blocks(stop - start, max(1, GRAIN // d_sae))):
            found += parts
            used += sum(len(indices) for indices, _ in parts)
        if used > most:
            return None
    indices, picked = (torch.from_numpy(np.concatenate(column)) for column in zip(*found, strict=True))
    kept = picked > 0
    if int(kept.sum()) > total:
        best = largest(picked.masked_fill(~kept, -torch.inf), total)
        kept = torch.zeros_like(kept).index_fill_(0, best, True)
    row = Support(indices, offsets_of(torch.from_numpy(sizes))).rows[kept]
    smallest = picked[kept].min() if bool(kept.any()) else picked.new_tensor(torch.inf)
    offsets = offsets_of(torch.bincount(row, minlength=rows))
    return Support(indices[kept], offsets, smallest.expand(rows), picked[kept])


def _fill_maxima(job: _Job, start: int, stop: int, maxima: np.ndarray) -> np.ndarray:
    """What the scores of the groups of some rows (less the shift) are at least, into maxima (rows, groups); the
    rounded scores."""
    scores = job.scores(start, stop)
    spread(
        lambda a, b: _lower_maxima_range(scores, job.errors[start:], maxima[start:], a, b),
        blocks(stop - start, max(1, GRAIN // scores.shape[1])),
    )
    return scores


def _bits(maxima: np.ndarray) -> np.ndarray:
    return maxima.reshape(-1).view(np.int32).copy()


def _array(bias: Tensor | None) -> np.ndarray:
    return np.zeros(0, np.float32) if bias is None else bias.detach().float().contiguous().numpy()


# ----------------------------------------------------------------------- loops


@numba_jit
def _round_range(rows, bits, out, first, second, third, norms, start, stop):
    """Round rows to bfloat16, to nearest and ties to even, and note their norms, what they lost, and what is left."""
    d = rows.shape[1]
    width = out.shape[1]
    for r in range(start, stop):
        x, b, o = rows[r], bits[r], out[r]
        whole = np.float32(0.0)
        lost = np.float32(0.0)
        left = np.float32(0.0)
        for j in range(d):
            u = b[j]
            rounded = (u + np.int32(0x7FFF) + ((u >> np.int32(16)) & np.int32(1))) >> np.int32(16)
            o[j] = np.int16(rounded)
            back = np.int32(rounded << np.int32(16)).view(np.float32)
            whole += x[j] * x[j]
            lost += (x[j] - back) * (x[j] - back)
            left += back * back
        o[d] = first
        o[d + 1] = second
        o[d + 2] = third
        for j in range(d + 3, width):
            o[j] = 0
        norms[0, r] = np.sqrt(whole)
        norms[1, r] = np.sqrt(lost)
        norms[2, r] = np.sqrt(left)


@numba_jit
def _ordered(b):
    """An int16 that orders as the bfloat16 of these bits does."""
    return b ^ ((b >> np.int16(15)) & np.int16(0x7FFF))


@numba_jit
def bfloat16_number(bits):
    """The number of the bits of a bfloat16."""
    return np.int32(np.int32(bits) << np.int32(16)).view(np.float32)


@numba_jit
def _value(key):
    """The number of an ordered int16."""
    return bfloat16_number(np.int16(key ^ ((key >> np.int16(15)) & np.int16(0x7FFF))))


@numba_jit
def _key_below(x):
    """The largest ordered int16 whose number is at most x, which is finite."""
    key = _ordered(np.int16(np.float32(x).view(np.int32) >> np.int32(16)))  # rounds towards zero
    if _value(key) > np.float32(x):
        key = np.int16(key - np.int16(1))
    return key


@numba_jit
def _group_maxima(row, maxima):
    """Fill the largest bits of each strided group (column mod their number), as int16.

    That is the largest score of the group if any is positive; else some other score of the group, which bounds the
    threshold too, less well.
    """
    groups = maxima.size
    for g in range(groups):
        maxima[g] = row[g]
    start = groups
    while start + 4 * groups <= row.size:
        a = row[start : start + groups]
        b = row[start + groups : start + 2 * groups]
        c = row[start + 2 * groups : start + 3 * groups]
        d = row[start + 3 * groups : start + 4 * groups]
        for g in range(groups):
            x = a[g] if a[g] > b[g] else b[g]
            y = c[g] if c[g] > d[g] else d[g]
            x = x if x > y else y
            maxima[g] = x if x > maxima[g] else maxima[g]
        start += 4 * groups
    while start < row.size:
        a = row[start : min(start + groups, row.size)]
        for g in range(a.size):
            maxima[g] = a[g] if a[g] > maxima[g] else maxima[g]
        start += groups


@numba_jit
def _reaching(row, key, maxima, opened, places):
    """Write the places of the scores of at least an ordered int16, ascending; return how many.

    With a positive key only groups whose largest reaches it are read again, and bits compare as scores do.
    """
    found = 0
    if key <= 0:
        for j in range(row.size):
            places[found] = j
            found += _ordered(row[j]) >= key
        return found
    groups = maxima.size
    many = counted = NONE
    for g in range(groups):
        opened[many] = g
        many += np.uint64(maxima[g] >= key)
    for start in range(0, row.size, groups):
        part = row[start : min(start + groups, row.size)]
        while many > 0 and opened[many - np.uint64(1)] >= part.size:  # the last part may be a shorter one
            many -= np.uint64(1)
        for i in range(many):
            g = opened[i]
            places[counted] = start + np.int64(g)
            counted += np.uint64(part[g] >= key)
    return np.int64(counted)


@numba_jit
def _least(keys, size, work, error, kind, k, alpha, floor):
    """A number that the rounded score of whatever can be selected reaches, from some of the row's scores.

    Top-k selects nothing below a floor.

    Each score may be too large by its rounding and by ``error``; the threshold of scores that are all too small is too
    small, and so is that of a part of them.
    """
    if kind == TOPK:
        bound = floor - error
        if size >= k:
            v = np.float64(_value(kth_largest(keys, size, k)))
            bound = max(bound, v - ROUNDING * abs(v) - 2.0 * error)
        return bound
    best = keys[0]
    for j in range(size):
        best = keys[j] if keys[j] > best else best
    v = np.float64(_value(best))
    shift = v - ROUNDING * abs(v)
    for j in range(size):
        v = np.float64(_value(keys[j]))
        # Lowered, the largest may no longer be the largest: none may exceed the shift.
        work[j] = min(v - ROUNDING * abs(v) - shift, 0.0)
    tau = simplex_threshold(work, size, kind, alpha)
    return shift + tau - 2.0 * error - 1e-6 * (abs(shift) + 1.0) * 0.125


@numba_jit
def _candidates(row, error, floor, kind, k, alpha, maxima, opened, keys16, work, places, many):
    """Write the places of the scores that a rule may select; return how many. ``many``: bounded better if no more."""
    groups = maxima.size
    _group_maxima(row, maxima)
    least = floor - error - 1e-15 * abs(floor)
    if kind != THRESHOLD:
        # Fewer, larger groups bound the simplex well enough, for less arithmetic.
        fold = 4 if kind != TOPK and groups >= 1024 else 1
        size = groups // fold
        for g in range(size):
            keys16[g] = _ordered(maxima[g])
        for part in range(1, fold):
            for g in range(size):
                key = _ordered(maxima[part * size + g])
                keys16[g] = key if key > keys16[g] else keys16[g]
        least = _least(keys16, size, work, error, kind, k, alpha, floor)
    found = _reaching(row, _key_below(least - ROUNDING * abs(least)), maxima, opened, places)
    if kind == THRESHOLD or not k < found <= many:
        return found
    # The candidates' own scores bound it better than the maxima of groups.
    for j in range(found):
        keys16[j] = _ordered(row[places[j]])
    least = max(least, _least(keys16, found, work, error, kind, k, alpha, floor))
    key = _key_below(least - ROUNDING * abs(least))
    kept = NONE
    for j in range(found):
        place = places[j]
        places[kept] = place
        kept += np.uint64(_ordered(row[place]) >= key)
    return np.int64(kept)


@numba_jit
def _screen_range(
    scores16, queries, keys, bias, errors, shifts, start, stop, kind, k, alpha, theta, own_theta, groups, room, tile,
    indices, picked, sizes, thresholds,
):  # fmt: skip
    """Select rows start to stop into indices and picked, until those are full; the size of an undecided row is -1.

    Rows come in batches, whose candidates are scored together, a tile of the keys at a time.

    Returns:
        The first row that was not done, and how many entries were written.
    """
    d_sae = scores16.shape[1]
    many = min(d_sae, 4 * room)
    maxima = np.empty(groups, np.int16)
    keys16 = np.empty(max(groups, many), np.int16)
    opened = np.empty(groups + 1, np.uint32)
    work = np.empty(max(groups, many), np.float64)
    places = np.empty(d_sae + 1, np.int32)
    few = np.empty(max(room, min(BATCH_ENTRIES, (stop - start) * room)), np.int32)
    exact = np.empty(few.size, np.float32)
    offsets = np.zeros(stop - start + 1, np.int64)
    used = 0
    first = start
    while first < stop:
        last = first
        while last < stop and offsets[last - first] + room <= few.size:
            at = offsets[last - first]
            found = room + 1
            error = np.float64(errors[last])
            if error < np.inf:
                floor = np.float64(theta) - np.float64(shifts[last])
                found = _candidates(
                    scores16[last], error, floor, kind, k, alpha, maxima, opened, keys16, work, places, many
                )
            sizes[last] = 0 if found <= room else -1
            found = found if found <= room else 0
            if used + at + found > indices.size:
                break
            for j in range(found):
                few[at + j] = places[j]
            last += 1
            offsets[last - first] = at + found
        if last == first:
            return first, used
        count = last - first
        rows = d_sae
        if offsets[count] * tile >= MIN_REUSE * count * d_sae:
            rows = tile
        sddmm_rows(queries[first:last], keys, few, offsets, 0, count, rows, exact)
        for r in range(first, last):
            at, found = offsets[r - first], offsets[r - first + 1] - offsets[r - first]
            if sizes[r] < 0:
                continue
            if found == 0 and kind != THRESHOLD and kind != TOPK:
                sizes[r] = -1
                continue
            own, scores = few[at : at + found], exact[at : at + found]
            if bias.size:
                for j in range(found):
                    scores[j] += bias[own[j]]
            size, threshold = settle(scores, own, found, work, kind, k, alpha, own_theta)
            for j in range(size):
                indices[used + j] = own[j]
                picked[used + j] = scores[j]
            sizes[r] = size
            if kind != THRESHOLD:
                thresholds[r] = threshold
            used += size
        first = last
    return stop, used


@numba_jit
def _lower_maxima_range(scores16, errors, maxima, start, stop):
    """Fill what the scores of each group's largest are at least, for rows start to stop."""
    groups = maxima.shape[1]
    held = np.empty(groups, np.int16)
    for r in range(start, stop):
        _group_maxima(scores16[r], held)
        for g in range(groups):
            v = np.float64(_value(_ordered(held[g])))
            maxima[r, g] = v - ROUNDING * abs(v) - np.float64(errors[r])


@numba_jit
def _value_of_rank(bits, rank):
    """The rank-th largest of float32 numbers, given by their bits, which are made over."""
    for j in range(bits.size):
        bits[j] = ordered_key(bits[j])
    return np.int32(ordered_key(kth_largest(bits, bits.size, rank))).view(np.float32)


@numba_jit
def _reach_range(scores16, queries, keys, bias, errors, start, stop, bound, groups, indices, picked, sizes):
    """Exact scores of whatever may reach a bound, of rows start to stop, until indices is full."""
    d_sae = scores16.shape[1]
    places = np.empty(d_sae + 1, np.int32)
    maxima = np.empty(groups, np.int16)
    opened = np.empty(groups + 1, np.uint32)
    used = 0
    for r in range(start, stop):
        least = np.float64(bound) - np.float64(errors[r])
        least -= 1e-6 * (abs(np.float64(bound)) + np.float64(errors[r]))
        _group_maxima(scores16[r], maxima)
        found = _reaching(scores16[r], _key_below(least - ROUNDING * abs(least)), maxima, opened, places)
        if used + found > indices.size:
            return r, used
        out = picked[used : used + found]
        dots(queries[r], keys, places, found, out)
        for j in range(found):
            indices[used + j] = places[j]
            if bias.size:
                out[j] += bias[places[j]]
        sizes[r] = found
        used += found
    return stop, used
