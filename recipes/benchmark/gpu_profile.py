"""Where the time of one training step goes: each part on its own, with what it must move and compute.

A part's floor is what its bytes take at the bandwidth of a big copy, or its operations at the rate of a big bfloat16
product, both measured here; whichever is longer. Bytes count every read and write once, gathered rows each time they
are gathered: a part whose rows stay in the L2 cache can come below its floor.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from gpu_clock import Clock, Job, half_products
from gpu_measure import Found, Row, case, half, room_for
from gpu_report import ratio
from gpu_step import our_sae, our_step
from saehooks.kernels.capacity import active
from saehooks.kernels.copies import shared_copies, shared_copy
from saehooks.kernels.deferred import Contribution
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from saehooks import kernels
from saehooks.kernels import Sparsemax, Support, gpu_adam, gpu_plan, gpu_products, gpu_scores, gpu_select


class Part(NamedTuple):
    """A piece of the step that can be run on its own."""

    name: str
    job: Job
    moved: float
    """Bytes read and written."""
    operations: float


def peaks(args: argparse.Namespace, clock: Clock, *_: int) -> Found:
    """What this device does at best: bytes of a big copy and operations of a big bfloat16 product, a second."""
    count, side = (64, 16) if clock.interpreted else (2**28, 8192)
    source = torch.zeros(count, device=clock.device)
    target = torch.empty_like(source)
    left = torch.randn(side, side, device=clock.device).to(half(clock))
    out = torch.empty_like(left)
    copy = clock.tried("copy", lambda: clock.graph_ms("copy", lambda: target.copy_(source)))
    read = clock.tried("read", lambda: clock.graph_ms("read", lambda: source.view(-1, side).amax(1)))
    product = clock.tried("product", lambda: clock.graph_ms("product", lambda: torch.mm(left, left, out=out)))
    return {
        "peaks": [
            {
                "copied GB/s": ratio(8e-6 * count, copy),
                "read GB/s": ratio(4e-6 * count, read),
                "bf16 TFLOP/s": ratio(2e-9 * side**3, product),
                "device memory GB": round(clock.free_gb(), 1) if clock.device.type == "cuda" else None,
            }
        ]
    }


def profiled(args: argparse.Namespace, clock: Clock, d_in: int, d_sae: int, peak: Row) -> Found:
    """Every part of a step at one size, and what is left over."""
    with half_products():
        x, keys = case(args.rows, d_sae, d_in, args.supports[0], clock)
        sae = our_sae(x, keys)
        with torch.no_grad():
            stages = sae.encode_stages(x)
        chosen, queries = stages.support, stages.prepared.queries
        with room_for(chosen):
            step = our_step(sae, x)
            whole = clock.tried("step", lambda: clock.graph_ms("step", step.whole))
            found = [_timed(clock, part, peak) for part in _encoding(queries, keys, chosen.indices.numel())]
            with shared_copies():
                found += [_timed(clock, part, peak) for part in _sparse(x, keys, chosen)]
    measured = [row["ms"] for row in found if row["ms"] is not None]
    rest = None if whole is None or len(measured) < len(found) else whole - sum(measured)
    found.append({"part": "the rest: small kernels, other parameters", "ms": rest})
    found.append({"part": "the whole step, as a CUDA graph", "ms": whole})
    return {"profile": found}


def accounted(args: argparse.Namespace, clock: Clock, d_in: int, d_sae: int) -> Found:
    """The device's own account of one step, by kernel."""
    with half_products():
        x, keys = case(args.rows, d_sae, d_in, args.supports[0], clock)
        sae = our_sae(x, keys)
        with torch.no_grad():
            chosen = sae.encode_stages(x).support
        step = our_step(sae, x)
        with room_for(chosen):
            return {"kernels": clock.tried("torch.profiler", lambda: by_kernel(clock, step.whole), theirs=True) or []}


def _timed(clock: Clock, part: Part, peak: Row) -> Row:
    """A part's time and its floor."""
    ms = clock.tried(part.name, lambda: clock.graph_ms(part.name, part.job))
    floors = [ratio(1e-6 * part.moved, peak["copied GB/s"]), ratio(1e-9 * part.operations, peak["bf16 TFLOP/s"])]
    floor = max((one for one in floors if one is not None), default=None)
    row: Row = {"part": part.name, "ms": ms, "moved MB": 1e-6 * part.moved, "G operations": 1e-9 * part.operations}
    return {**row, "floor ms": floor, "/ floor": ratio(ms, floor)}


def _encoding(queries: Tensor, keys: Tensor, entries: int) -> list[Part]:
    """From queries to codes: operands, product, selection in its launches."""
    rows, d_in, d_sae = *queries.shape, keys.shape[0]
    rule, plan = gpu_select.describe(Sparsemax(), d_sae, queries.device), gpu_plan.select_plan(d_sae)
    left, right = gpu_scores.operands(queries, keys)
    scores = gpu_scores.product(left, right, torch.empty(rows, d_sae, device=queries.device))
    candidates = gpu_select.collect(scores, rule, plan)
    listed = int(candidates.counts.clamp(max=plan.cap).sum())

    def settle() -> Support:
        room = active()
        target = gpu_select.Target.of(room, queries.device)
        return target.whole([gpu_select.settle(candidates, rule, plan, scores, target=target)], room)

    written = 4.0 * rows * d_sae
    return [
        Part("operands in half precision", lambda: gpu_scores.operands(queries, keys), 6.0 * (rows + d_sae) * d_in, 0),
        Part(
            "product, scores written",
            lambda: gpu_scores.product(left, right, scores),
            left.element_size() * (rows + d_sae) * d_in + written,
            2.0 * rows * d_sae * d_in,
        ),
        Part("selection: collect", lambda: gpu_select.collect(scores, rule, plan), written + 8.0 * listed, 0),
        Part("selection: finish and fill", settle, 12.0 * listed + 12.0 * entries, 0),
    ]


def _sparse(x: Tensor, table: Tensor, chosen: Support) -> list[Part]:
    """From codes to updated tables: the sparse products, the order by column, the sums inside Adam.

    Rows of the table are gathered from the half-precision copy that the product was made with.
    """
    (rows, d_in), d_sae, n = x.shape, table.shape[0], chosen.indices.numel()
    indices, offsets, path = chosen.indices, chosen.offsets, kernels.path(x)
    values, eye = torch.randn(n, device=x.device), torch.eye(d_in, device=x.device)
    row_bytes, gathered = 4.0 * rows * d_in, n * (float(shared_copy(table).element_size()) * d_in + 12.0)
    state = table.clone(), torch.zeros_like(table), torch.zeros_like(table)
    settings = {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    numbers = gpu_adam.numbers(settings, torch.ones((), device=x.device), None)
    sums = [Contribution(values, indices, offsets, x)] * 2

    def small() -> None:
        for _ in range(2):
            torch.mm(x, eye)
        for _ in range(2):
            torch.mm(x.T, x)
        torch.mm(x, eye.T)

    return [
        Part("decode: spmm", lambda: path.spmm(values, indices, offsets, table), gathered + row_bytes, 2.0 * n * d_in),
        Part("codes' gradient: sddmm", lambda: path.sddmm(x, table, indices, offsets), gathered + row_bytes, 0),
        Part("queries' gradient: spmm", lambda: path.spmm(values, indices, offsets, table), gathered + row_bytes, 0),
        # A copy, since the order of a support is remembered. Four passes of a radix sort over keys and places.
        Part("order by column", lambda: gpu_products.columns(indices.clone(), offsets, d_sae), 4 * 2 * 12.0 * n, 0),
        Part(
            "table's gradient (two column sums) and Adam, fused",
            lambda: gpu_adam.update(*state, sums, numbers),
            24.0 * d_sae * d_in + 2 * n * (4.0 * d_in + 20.0),
            0,
        ),
        Part("five products with W_k and W_v", small, 5 * 2 * row_bytes, 5 * 2.0 * rows * d_in**2),
    ]


def by_kernel(clock: Clock, job: Job, most: int = 24) -> list[Row]:
    """What torch.profiler saw of one run: the device's kernels by time; in the interpreter the operations by calls."""
    job()
    kinds = [ProfilerActivity.CPU] if clock.interpreted else [ProfilerActivity.CUDA]
    with profile(activities=kinds) as seen:
        job()
        if not clock.interpreted:
            torch.cuda.synchronize()
    events = seen.key_averages()
    if clock.interpreted:
        events = sorted(events, key=lambda event: -event.count)[:most]
        return [{"kernel": event.key, "calls": event.count, "ms": None} for event in events]
    events = [event for event in events if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    rows = [_kernel(event.key[:90], event.count, event.self_device_time_total) for event in events[:most]]
    return [*rows, _kernel("all kernels", sum(event.count for event in events), total)]


def _kernel(name: str, calls: int, microseconds: float) -> Row:
    return {"kernel": name, "calls": calls, "ms": 1e-3 * microseconds}
