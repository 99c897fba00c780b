"""Launch shapes, tried out: which selection and which product a GPU prefers, and whether scores should be written."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from gpu_clock import Clock
from gpu_exact import agreement
from gpu_measure import Found, Row, case, gemm_plan, half, room_for, written
from gpu_report import ratio
from saehooks.kernels.capacity import active
from saehooks.kernels.gpu_plan import GemmPlan, SelectPlan
from torch import Tensor

from saehooks.kernels import Sparsemax, Support, gpu_plan, gpu_scores, gpu_select

SECONDS = 12.0
"""For the selections of one size, and for the products of one size; variants not begun by then are left out."""


def select_plans(d_sae: int, clock: Clock) -> list[SelectPlan]:
    """The default first, then other tiles with 8 and 16 scores a thread, and other shares of them read again."""
    default, whole = gpu_plan.select_plan(d_sae), gpu_plan.power_of_two(d_sae)
    tiles = (16, 32) if clock.interpreted else (1024, 2048, 4096, 8192)
    tried = [
        default._replace(tile=tile, gather=max(1, tile // 4), collect_warps=max(1, tile // scores))
        for tile in tiles
        for scores in (256, 512)
        if tile <= whole and tile // scores <= 16  # more warps spill registers
    ]
    tried += [default._replace(gather=max(1, default.tile // share)) for share in (1, 2, 8)]
    return list(dict.fromkeys([default, *tried]))


def gemm_plans(clock: Clock) -> list[GemmPlan]:
    """The default first, then other tiles, deeper pipelines, and other shares of latents scored beforehand.

    Compiled for sm_90, none of them spills registers; 128 x 256 tiles and 128 x 128 with 4 warps do.
    """
    default = gemm_plan(clock)
    if clock.interpreted:
        return [default, default._replace(step=8), default._replace(rows=32)]
    changes: tuple[dict[str, Any], ...] = (
        {"stages": 4}, {"step": 16}, {"rows": 64, "warps": 4, "stages": 4}, {"rows": 64, "latents": 256},
        {"rows": 256, "latents": 64}, {"depth": 128, "stages": 2}, {"band": 16}, {"step": 4},
    )  # fmt: skip
    return [default, *(default._replace(**change) for change in changes)]


def swept(args: argparse.Namespace, clock: Clock, d_in: int, d_sae: int) -> Found:
    """Every launch shape at one size and support; each must select exactly what the default selects."""
    support = args.supports[0]
    queries, keys = (tensor.to(half(clock)) for tensor in case(args.rows, d_sae, d_in, support, clock))
    found: Found = {"select plans": [], "product plans": []}
    expected = written(queries, keys)
    with room_for(expected):
        scores = gpu_scores.product(queries, keys, torch.empty(args.rows, d_sae, device=clock.device))
        began = time.perf_counter()
        for plan in select_plans(d_sae, clock):
            if _over(clock, began, f"selection of {d_sae} latents with {plan}"):
                continue
            found["select plans"].append(_select_row(clock, scores, plan, expected))
        name = f"written, {d_sae}"
        base = clock.tried(name, lambda: clock.graph_ms(name, lambda: written(queries, keys)))
        began = time.perf_counter()
        for shape in gemm_plans(clock):
            if _over(clock, began, f"product of {d_sae} latents with {shape}"):
                continue
            found["product plans"].append(_gemm_row(clock, (queries, keys), scores, shape, expected, base))
    return found


def _over(clock: Clock, began: float, what: str) -> bool:
    over = clock.late or time.perf_counter() - began > SECONDS
    if over:
        clock.skip(what, "no time left")
    return over


def _select_row(clock: Clock, scores: Tensor, plan: SelectPlan, expected: Support) -> Row:
    rule, name = gpu_select.describe(Sparsemax(), scores.shape[1], scores.device), f"selection with {plan}"

    def select() -> Support:
        return gpu_select.select_scores([scores], rule, None, plan)[0]

    row: Row = {"d_sae": scores.shape[1], **plan._asdict()}
    collect = clock.tried(name, lambda: clock.graph_ms(name, lambda: gpu_select.collect(scores, rule, plan)))
    whole = clock.tried(name, lambda: clock.graph_ms(name, select))
    same = clock.tried(name, lambda: _equal(select(), expected))
    if same is False:
        clock.fail(name, "selects something else than the default")
    return {**row, "collect ms": collect, "selection ms": whole, "same": same}


def _gemm_row(
    clock: Clock,
    operands: tuple[Tensor, Tensor],
    scores: Tensor,
    plan: GemmPlan,
    expected: Support,
    written_ms: float | None,
) -> Row:
    queries, keys = operands
    rule, name = gpu_select.describe(Sparsemax(), keys.shape[0], queries.device), f"product with {plan}"

    def select() -> Support:
        return gpu_scores.select_unwritten(queries, keys, rule, None, plan)

    room = active()
    room.reset()
    ms = clock.tried(name, lambda: clock.graph_ms(name, select))
    # Another order of summing may move a score across the threshold, not far from it.
    same = clock.tried(name, lambda: agreement(name, scores, select(), expected, 1e-4)["error"] <= 1e-4)
    if same is False and not room.overflowed:
        clock.fail(name, "selects something else than from written scores")
    row: Row = {"d_sae": keys.shape[0], **plan._asdict(), "encode ms": ms, "/ written": ratio(ms, written_ms)}
    return {**row, "overflowed": room.overflowed, "same": same}


def _equal(found: Support, expected: Support) -> bool:
    used = int(found.offsets[-1])
    return torch.equal(found.offsets, expected.offsets) and torch.equal(found.indices[:used], expected.indices)


def advice(found: dict[str, Any]) -> list[str]:
    """The best launch shapes, and from how many scores on they should not be written, as the measurements say."""
    lines = []
    for section, column in (("select plans", "selection ms"), ("product plans", "encode ms")):
        timed = [row for row in found.get(section, []) if row[column] is not None and row["same"]]
        for d_sae in sorted({row["d_sae"] for row in timed}):
            rows = [row for row in timed if row["d_sae"] == d_sae and not row.get("overflowed")]
            if rows:
                best = min(rows, key=lambda row: row[column])
                shape = ", ".join(f"{key}={best[key]}" for key in _shape(best))
                gain = rows[0][column] / best[column]
                lines.append(
                    f"{section}, {d_sae} latents: best {shape}: {best[column]:.3f} ms, default / best {gain:.2f}."
                )
    return [*lines, _unwritten_from(found)]


def _shape(row: Row) -> list[str]:
    return [key for key in row if key in (*SelectPlan._fields, *GemmPlan._fields)]


def _unwritten_from(found: dict[str, Any]) -> str:
    """Compares both forms at every measured size."""
    rows, pairs = found["rows"], []
    for row in found.get("encode", []):
        if row["written ms"] is not None and row["unwritten ms"] is not None:
            better = row["unwritten ms"] < row["written ms"] and not row["unwritten overflowed"]
            pairs.append((rows * row["d_sae"], better))
    if not pairs:
        return "`gpu_plan.UNWRITTEN_FROM`: not measured, leave it None."
    worse = max((size for size, better in pairs if not better), default=0)
    above = sorted(size for size, better in pairs if better and size > worse)
    if not above:
        return f"`gpu_plan.UNWRITTEN_FROM`: leave it None, writing the scores is faster at {worse} scores."
    return f"`gpu_plan.UNWRITTEN_FROM`: set it to {above[0]}: from there on every measured size is faster unwritten."
