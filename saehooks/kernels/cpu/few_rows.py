"""Exact selection for a few rows through an int8 screen: what the table's memory costs is most of what they cost.

The product of one row reads the table once and does little else, so a quarter of the bytes takes a quarter of the
time. Keys are rounded to int8 in units of their own, queries to as many bits as an int32 sum allows; sums of whole
numbers are exact. By Cauchy-Schwarz, for queries q and keys k rounded to q' and k',
``|q.k - q'.k'| <= |q - q'| |k| + |q'| |k - k'|``, key by key, so each score lies in an interval. The threshold of the
lower ends bounds the row's from below; whatever reaches it with its upper end is scored in float32, and the rule is
applied to those scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saehooks.kernels.cpu.numba_jit import numba_jit
from saehooks.kernels.cpu.products import dots
from saehooks.kernels.cpu.select import candidates, group_count, lower_bound, places_above, summarise
from saehooks.kernels.cpu.threads import GRAIN, blocks, spread
from saehooks.kernels.cpu.thresholds import NONE, THRESHOLD, TOPK, described, settle
from saehooks.kernels.memory import reusable_empty
from saehooks.kernels.rules import RowRule
from saehooks.support import Support

MOST_ROWS = 4
"""Rows up to which the table's bytes are what counts; more are multiplied in bfloat16."""
SUMMING = 2.0**-23
"""Relative error a term of a float32 sum, twice over."""
SMALLEST, LARGEST = 1e-12, 1e18
"""Norms between which rounding errors are bounded: beyond, squares underflow or products overflow."""
AHEAD = 8192
"""Bytes of the table between what is multiplied and what is fetched meanwhile; past its end that does nothing."""
PART = 512
"""Keys whose products are made before their bounds are, which are vectors then."""
WIDTH = 64
"""Columns are padded to a multiple of this, which the loop takes at once."""


@dataclass
class Int8Table:
    """Rows of a table in int8, each in units of its own."""

    table: np.ndarray
    """(d_sae, width) int8."""
    numbers: np.ndarray
    """(3, d_sae) float32: the unit of each row, its norm, and the norm of what rounding lost of it."""
    usable: bool
    """Whether every row's errors are bounded."""

    @property
    def nbytes(self) -> int:
        """Memory that is held."""
        return self.table.nbytes + self.numbers.nbytes


def int8_keys(keys: Tensor, bias: Tensor | None = None) -> Int8Table:
    """Keys (d_sae, d) float32 in int8; a bias is added later, as it is."""
    matrix = keys.detach().contiguous().numpy()
    d_sae, d = matrix.shape
    table = reusable_empty(d_sae, -(-d // WIDTH) * WIDTH // 4).view(torch.int8).numpy()
    numbers = np.empty((3, d_sae), np.float32)
    spread(
        lambda start, stop: _round_range(matrix, table, numbers, start, stop),
        blocks(d_sae, max(1, GRAIN // max(1, d))),
    )
    norm = numbers[1]
    return Int8Table(table, numbers, bool(((norm < LARGEST) & ((norm == 0) | (norm > SMALLEST))).all()))


def select_few(queries: Tensor, keys: Tensor, rule: RowRule, bias: Tensor | None, table: Int8Table) -> Support | None:
    """Support of a few rows; None if a row cannot be screened: not finite, or too many candidates.

    Args:
        queries: (rows, d) float32.
        keys: (d_sae, d) float32, contiguous.
        rule: a row rule that the CPU's loops know.
        bias: (d_sae,) or None.
        table: the keys, rounded.
    """
    if not table.usable:
        return None
    rows, d_sae = queries.shape[0], keys.shape[0]
    kind, k, alpha, theta = described(rule, d_sae)
    matrix, exact_keys = queries.contiguous().numpy(), keys.numpy()
    added = np.zeros(0, np.float32) if bias is None else bias.detach().float().contiguous().numpy()
    settling = kind, k, alpha, theta, group_count(d_sae, k)
    room = max(64 + 2 * k, d_sae // 8)
    indices, picked = np.empty(rows * room, np.int64), np.empty(rows * room, np.float32)
    offsets, thresholds = np.empty(rows + 1, np.int64), np.empty(rows, np.float32)
    chosen = room, indices, picked, offsets, thresholds
    ranges = blocks(d_sae, max(1, GRAIN // max(1, rows * matrix.shape[1] // 8)))
    if torch.get_num_threads() == 1 or len(ranges) == 1:
        used = _select_rows(matrix, exact_keys, table.table, table.numbers, added, *settling, *chosen)
    else:
        rounded, bounds = np.empty((rows, table.table.shape[1]), np.int16), np.empty((rows, 4), np.float32)
        if not _round_queries(matrix, rounded, bounds):
            return None
        low, high = np.empty((rows, d_sae), np.float32), np.empty((rows, d_sae), np.float32)
        intervals = rounded, bounds, table.table, table.numbers, added
        spread(lambda start, stop: _interval_range(*intervals, start, stop, low, high), ranges)
        used = _settle_rows(low, high, matrix, exact_keys, added, *settling, *chosen)
    if used < 0:
        return None
    latents, starts, threshold, scores = map(torch.from_numpy, (indices[:used], offsets, thresholds, picked[:used]))
    return Support(latents, starts, threshold, scores)


# ----------------------------------------------------------------------- loops


@numba_jit
def _round_range(matrix, table, numbers, start, stop):
    """Round rows to int8, and note their units, their norms and what they lost."""
    d = matrix.shape[1]
    for r in range(start, stop):
        x, o = matrix[r], table[r]
        most = np.float32(0.0)
        whole = np.float32(0.0)
        for j in range(d):
            most = max(most, abs(x[j]))
            whole += x[j] * x[j]
        unit = max(most / np.float32(127.0), np.float32(1e-30))
        lost = np.float32(0.0)
        for j in range(d):
            steps = np.rint(x[j] / unit)
            steps = min(max(steps, np.float32(-127.0)), np.float32(127.0))
            o[j] = np.int8(steps)
            gap = x[j] - steps * unit
            lost += gap * gap
        for j in range(d, o.size):
            o[j] = 0
        numbers[0, r] = unit
        numbers[1, r] = np.sqrt(whole)
        numbers[2, r] = np.sqrt(lost)


@numba_jit
def _round_queries(matrix, rounded, bounds):
    """Round rows to whole numbers whose sums with int8 fit into int32; say whether every row's error is bounded.

    Bounds of a row: its unit, what its rounding lost, the norm of what is left, and that of the whole.
    """
    rows, d = matrix.shape
    most_steps = np.float32(min(32767.0, np.floor(2147483647.0 / (127.0 * d)) - 1.0))
    for r in range(rows):
        x, o = matrix[r], rounded[r]
        most = np.float32(0.0)
        whole = 0.0
        for j in range(d):
            most = max(most, abs(x[j]))
            whole += np.float64(x[j]) * np.float64(x[j])
        whole = np.sqrt(whole)
        if not (whole > SMALLEST and whole < LARGEST):
            return False
        unit = most / most_steps
        lost = 0.0
        left = 0.0
        for j in range(d):
            steps = min(max(np.rint(x[j] / unit), -most_steps), most_steps)
            o[j] = np.int16(steps)
            back = np.float64(steps) * np.float64(unit)
            lost += (np.float64(x[j]) - back) ** 2
            left += back * back
        for j in range(d, o.size):
            o[j] = 0
        bounds[r, 0] = unit
        bounds[r, 1] = np.sqrt(lost)
        bounds[r, 2] = np.sqrt(left)
        bounds[r, 3] = whole
    return True


def _whole_dot() -> Callable[..., Any]:
    """``dot(query, row)`` of int16 and int8 arrays of WIDTH's multiple, as a number of int32."""

    @numba_jit
    def plain(query, row):
        total = np.int32(0)
        for j in range(row.size):
            total = np.int32(total + np.int32(np.int32(row[j]) * np.int32(query[j])))
        return total

    from llvmlite import binding

    if not binding.get_host_cpu_features().get("avx512bw"):
        return plain

    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
    from numba.np.arrayobj import make_array

    bits8, bits16, bits32 = (ir.VectorType(ir.IntType(size), count) for size, count in ((8, 32), (16, 32), (32, 16)))

    @intrinsic
    def multiplied(typing_context, query, row, size):
        """VPMADDWD, which no loop that numba compiles is turned into."""

        def generate(context, builder, signature, arguments):
            left, right = (
                make_array(kind)(context, builder, value).data
                for kind, value in zip(signature.args[:2], arguments[:2], strict=True)
            )
            size = arguments[2]
            products = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(bits32, [bits16, bits16]), "llvm.x86.avx512.pmaddw.d.512"
            )
            fetch = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), *[ir.IntType(32)] * 3]),
                "llvm.prefetch.p0",
            )
            to_read_as_data_and_keep = [ir.Constant(ir.IntType(32), flag) for flag in (0, 3, 1)]
            sum_up = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.IntType(32), [bits32]), "llvm.vector.reduce.add.v16i32"
            )
            sums = [cgutils.alloca_once_value(builder, ir.Constant(bits32, [0] * 16)) for _ in range(2)]
            first, stride = ir.Constant(size.type, 0), ir.Constant(size.type, WIDTH)
            with cgutils.for_range_slice(builder, first, size, stride) as (start, _):
                ahead = builder.gep(right, [builder.add(start, ir.Constant(size.type, AHEAD))])
                builder.call(fetch, [ahead, *to_read_as_data_and_keep])
                for part, total in enumerate(sums):
                    place = builder.add(start, ir.Constant(size.type, 32 * part))
                    a = builder.load(builder.bitcast(builder.gep(left, [place]), bits16.as_pointer()))
                    b = builder.load(builder.bitcast(builder.gep(right, [place]), bits8.as_pointer()))
                    a.align = b.align = 1
                    added = builder.call(products, [a, builder.sext(b, bits16)])
                    builder.store(builder.add(builder.load(total), added), total)
            return builder.call(sum_up, [builder.add(*(builder.load(total) for total in sums))])

        return types.int32(query, row, size), generate

    @numba_jit
    def dot(query, row):
        return multiplied(query, row, row.size)  # type: ignore[call-arg]

    return dot


whole_dot = _whole_dot()


@numba_jit
def _interval_range(rounded, bounds, table, numbers, bias, start, stop, low, high):
    """Fill between what each row's scores with keys start to stop lie; `PART` products at a time, then their bounds."""
    d = rounded.shape[1]
    products = np.empty((rounded.shape[0], PART), np.int32)
    for first in range(start, stop, PART):
        last = min(first + PART, stop)
        for j in range(first, last):
            for r in range(rounded.shape[0]):
                products[r, j - first] = whole_dot(rounded[r], table[j])
        units, norms, losses = numbers[0, first:last], numbers[1, first:last], numbers[2, first:last]
        for r in range(rounded.shape[0]):
            unit, lost = np.float64(bounds[r, 0]), np.float64(bounds[r, 1])
            left, whole = np.float64(bounds[r, 2]), np.float64(bounds[r, 3])
            own, lower, upper = products[r], low[r, first:last], high[r, first:last]
            for j in range(last - first):
                norm = np.float64(norms[j])
                score = np.float64(own[j]) * np.float64(units[j]) * unit
                error = (lost * norm + left * np.float64(losses[j])) * (1.0 + 2e-3)
                error += d * SUMMING * whole * norm + 1e-16 * (whole + norm) + 1e-34
                if bias.size:
                    score += np.float64(bias[first + j])
                    error += 2.0**-22 * abs(np.float64(bias[first + j]))
                error += 2.0**-22 * abs(score)
                lower[j] = score - error
                upper[j] = score + error


@numba_jit
def _settle_rows(
    low, high, queries, keys, bias, kind, k, alpha, theta, groups, room, indices, picked, offsets, thresholds
):  # fmt: skip
    """Select all rows; return how many entries, or -1 if a row cannot be screened."""
    rows, d_sae = low.shape
    maxima = np.empty(groups, np.float32)
    sums = np.empty(groups, np.float32)
    work = np.empty(d_sae, np.float64)
    places = np.empty(d_sae + 1, np.int32)
    few = np.empty(d_sae, np.float32)
    lowest = theta.min()
    offsets[0] = used = 0
    for r in range(rows):
        upper = high[r]
        if not summarise(low[r], maxima, sums):
            return -1
        if kind == THRESHOLD:
            found = 0
            for j in range(d_sae):
                places[found] = j
                found += upper[j] >= (theta[0] if theta.size == 1 else theta[j])
        else:
            bound = lower_bound(maxima, work, kind, k, alpha)
            if kind == TOPK and bound == 0.0:
                found = places_above(upper, bound, places)
            else:
                found = candidates(upper, bound, places)
            if k < found <= room:
                # The candidates' own lower ends bound it better than the maxima of groups.
                for j in range(found):
                    few[j] = low[r, places[j]]
                better = lower_bound(few[:found], work, kind, k, alpha)
                kept = NONE
                for j in range(found):
                    place = places[j]
                    places[kept] = place
                    kept += np.uint64(upper[place] >= better)
                found = np.int64(kept)
        if found > room or (found == 0 and kind != THRESHOLD and kind != TOPK):
            return -1
        dots(queries[r], keys, places, found, few)
        if bias.size:
            for j in range(found):
                few[j] += bias[places[j]]
        size, threshold = settle(few, places, found, work, kind, k, alpha, theta)
        for j in range(size):
            indices[used + j] = places[j]
            picked[used + j] = few[j]
        used += size
        offsets[r + 1] = used
        thresholds[r] = lowest if kind == THRESHOLD else threshold
    return used


@numba_jit
def _select_rows(
    queries, keys, table, numbers, bias, kind, k, alpha, theta, groups, room, indices, picked, offsets, thresholds
):  # fmt: skip
    """Round, bound and select all rows on one thread; return how many entries, or -1 if a row cannot be screened."""
    rows, d_sae = queries.shape[0], keys.shape[0]
    rounded = np.empty((rows, table.shape[1]), np.int16)
    bounds = np.empty((rows, 4), np.float32)
    if not _round_queries(queries, rounded, bounds):
        return -1
    low, high = np.empty((rows, d_sae), np.float32), np.empty((rows, d_sae), np.float32)
    _interval_range(rounded, bounds, table, numbers, bias, 0, d_sae, low, high)
    return _settle_rows(
        low, high, queries, keys, bias, kind, k, alpha, theta, groups, room, indices, picked, offsets, thresholds
    )
