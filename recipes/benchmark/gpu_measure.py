"""Selection, scoring and decoding on the GPU: one function a section, each returning rows of the report."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import Clock
from gpu_report import ratio
from torch import Tensor

from saehooks import kernels
from saehooks.kernels import Capacity, Sparsemax, Support, TopK, gpu_plan, gpu_scores, gpu_select

TOPK = 64
Row = dict[str, Any]
Found = dict[str, list[Row]]
"""Rows by section of the report."""


def half(clock: Clock) -> torch.dtype:
    """What products are made in: bfloat16 on a GPU."""
    return torch.float32 if clock.interpreted else torch.bfloat16


def gemm_plan(clock: Clock) -> gpu_plan.GemmPlan:
    """Launch shape of the product that writes no scores; a toy one in the interpreter."""
    small = {"step": 4, "rows": 16, "latents": 32, "depth": 16, "band": 2, "warps": 4, "stages": 2, "cap": 64}
    return gpu_plan.GEMM_PLAN._replace(**small) if clock.interpreted else gpu_plan.GEMM_PLAN


def case(rows: int, d_sae: int, d_in: int, support: int, clock: Clock) -> tuple[Tensor, Tensor]:
    """Queries, scaled so that sparsemax selects about ``support`` of the unit keys, and the keys."""
    queries = torch.randn(rows, d_in, device=clock.device)
    keys = F.normalize(torch.randn(d_sae, d_in, device=clock.device), dim=1)
    low, high = 1e-2, 1e2
    sample = queries[: 2 if clock.interpreted else 64]
    for _ in range(3 if clock.interpreted else 14):
        scale = (low * high) ** 0.5
        size = kernels.select(sample * scale, keys, Sparsemax()).indices.numel() / len(sample)
        low, high = (scale, high) if size > support else (low, scale)
    return queries * scale, keys


def l0(support: Support) -> float:
    """Entries a row."""
    return float(support.offsets[-1]) / (support.offsets.numel() - 1)


def room_for(support: Support) -> AbstractContextManager[Capacity]:
    """A capacity with a quarter more room than a selection took."""
    return kernels.capacity(max(1, int(1.25 * int(support.offsets[-1]))))


# ------------------------------------------------------- selection on given scores


def selected(args: argparse.Namespace, clock: Clock, d_in: int, d_sae: int) -> Found:
    """Selection on given scores against torch.topk, torch.sort and one pass of amax."""
    return {"select": [_selected(args, clock, d_in, d_sae, support) for support in args.supports]}


def _selected(args: argparse.Namespace, clock: Clock, d_in: int, d_sae: int, support: int) -> Row:
    scores, k = torch.mm(*_transposed(case(args.rows, d_sae, d_in, support, clock))), min(TOPK, d_sae)
    row: Row = {"d_sae": d_sae, "d_in": d_in, "support": support}
    sparsemax = kernels.select_rows(scores, Sparsemax())
    row["l0"] = l0(sparsemax)
    with room_for(sparsemax):
        name = "saehooks sparsemax"
        row[f"{name} ms"] = clock.tried(
            name, lambda: clock.graph_ms(name, lambda: kernels.select_rows(scores, Sparsemax()))
        )
        row["launched from Python ms"] = clock.tried(
            name, lambda: clock.ms(lambda: kernels.select_rows(scores, Sparsemax()))
        )
    with room_for(kernels.select_rows(scores, TopK(k))):
        row["saehooks topk ms"] = clock.tried(
            "topk", lambda: clock.graph_ms("topk", lambda: kernels.select_rows(scores, TopK(k)))
        )
    row["torch.amax ms"] = clock.tried("amax", lambda: clock.graph_ms("amax", lambda: scores.amax(1)))
    row["torch.topk ms"] = clock.tried("torch.topk", lambda: clock.ms(lambda: scores.topk(k, dim=1)))
    row["torch.sort ms"] = None
    if support == args.supports[0]:
        needed = 1e-9 * 32 * scores.numel()
        row["torch.sort ms"] = clock.tried("torch.sort", lambda: clock.ms(lambda: scores.sort(dim=1)), needed)
    mine = row["saehooks sparsemax ms"]
    row["/ topk"], row["/ amax"] = ratio(mine, row["torch.topk ms"]), ratio(mine, row["torch.amax ms"])
    return row


def _transposed(made: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return made[0], made[1].T


# ------------------------------------------------------------- product and selection


def scored(args: argparse.Namespace, clock: Clock, d_in: int, d_sae: int) -> Found:
    """Product and selection together against the vendor's product alone, scores written and not."""
    return {"encode": [_scored(args, clock, d_in, d_sae, support) for support in args.supports]}


def _scored(args: argparse.Namespace, clock: Clock, d_in: int, d_sae: int, support: int) -> Row:
    queries, keys = (tensor.to(half(clock)) for tensor in case(args.rows, d_sae, d_in, support, clock))
    product = product_ms(clock, queries, keys)
    rule, plan = gpu_select.describe(Sparsemax(), d_sae, clock.device), gemm_plan(clock)
    with room_for(written(queries, keys)) as room:
        times = {
            "written": clock.tried("written", lambda: clock.graph_ms("written", lambda: written(queries, keys))),
            "unwritten": clock.tried(
                "unwritten",
                lambda: clock.graph_ms(
                    "unwritten", lambda: gpu_scores.select_unwritten(queries, keys, rule, None, plan)
                ),
            ),
        }
        room.reset()
        gpu_scores.select_unwritten(queries, keys, rule, None, plan)
        lost = room.overflowed
    best = min((ms for ms in times.values() if ms is not None), default=None)
    row: Row = {"d_sae": d_sae, "d_in": d_in, "support": support, "product ms": product}
    row |= {f"{name} ms": ms for name, ms in times.items()}
    row |= {f"{name} / product": ratio(ms, product) for name, ms in times.items()}
    row |= {"unwritten overflowed": lost, "best / product": ratio(times["written"] if lost else best, product)}
    row["product TFLOP/s"] = ratio(2e-9 * args.rows * d_sae * d_in, product)
    return row


def product_ms(clock: Clock, queries: Tensor, keys: Tensor) -> float | None:
    """The encoder's product alone, by the vendor's library, in half precision, into memory that is there."""
    queries, keys = queries.to(half(clock)), keys.to(half(clock))
    out = torch.empty(queries.shape[0], keys.shape[0], dtype=queries.dtype, device=queries.device)
    return clock.tried("product", lambda: clock.graph_ms("product", lambda: torch.mm(queries, keys.T, out=out)))


def written(queries: Tensor, keys: Tensor) -> Support:
    """Encode by the vendor's product and a selection from its scores, whatever the plan would choose."""
    before, gpu_plan.UNWRITTEN_FROM = gpu_plan.UNWRITTEN_FROM, None
    try:
        return kernels.select(queries, keys, Sparsemax())
    finally:
        gpu_plan.UNWRITTEN_FROM = before


# ---------------------------------------------------------------------- decoding


def decoded(args: argparse.Namespace, clock: Clock, d_in: int, d_sae: int) -> Found:
    """Sparse products against dense ones, with the bytes that gathering moves."""
    return {"decode": [_decoded(args, clock, d_in, d_sae, support) for support in args.supports]}


def _decoded(args: argparse.Namespace, clock: Clock, d_in: int, d_sae: int, support: int) -> Row:
    queries, keys = case(args.rows, d_sae, d_in, support, clock)
    chosen = kernels.select(queries, keys, Sparsemax())
    indices, offsets = chosen.indices, chosen.offsets
    values, path = torch.randn(indices.numel(), device=clock.device), kernels.path(queries)
    row: Row = {"d_sae": d_sae, "d_in": d_in, "support": support, "l0": l0(chosen)}
    jobs = {
        "spmm": lambda: path.spmm(values, indices, offsets, keys),
        "sddmm": lambda: path.sddmm(queries, keys, indices, offsets),
        # A fresh copy of the indices: otherwise their order by column is remembered, and the sort left out.
        "spmm_transposed": lambda: path.spmm_transposed(values, indices.clone(), offsets, queries, d_sae),
    }
    for name, job in jobs.items():
        row[f"{name} ms"] = clock.tried(name, lambda name=name, job=job: clock.graph_ms(name, job))
    dense = torch.randn(args.rows, d_sae, dtype=half(clock), device=clock.device)
    table = keys.to(half(clock))
    row["dense ms"] = clock.tried("dense", lambda: clock.graph_ms("dense", lambda: dense @ table))
    row["spmm / dense"] = ratio(row["spmm ms"], row["dense ms"])
    row["gathered GB/s"] = ratio(1e-6 * indices.numel() * d_in * keys.element_size(), row["spmm ms"])
    return row
