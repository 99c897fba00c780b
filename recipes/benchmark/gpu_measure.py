"""What the GPU benchmark measures, one function a section; each returns rows for a table."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_report import Clock, graphed, ratio, tried
from gpu_rivals import PublishedSparsemax, SAELensTopK, SparsifyTopK
from torch import Tensor, nn

from saehooks import SAE, kernels
from saehooks.codes import rows_of
from saehooks.kernels import Entmax, RowRule, Sparsemax, Support, Threshold, TopK, gpu_plan, gpu_scores, gpu_select
from saehooks.optim import TableAdam

TOPK = 64
Row = dict[str, Any]


def half(clock: Clock) -> torch.dtype:
    """What products are made in: bfloat16 on a GPU."""
    return torch.float32 if clock.interpreted else torch.bfloat16


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
    return support.indices.numel() / (support.offsets.numel() - 1)


# ------------------------------------------------------------------ exactness


def checked(args: argparse.Namespace, clock: Clock) -> list[Row]:
    """Every kernel against float64, on fresh random inputs; raises if one is wrong."""
    d_sae, d_in, rows = args.d_sae[0], args.d_in[0], 3 if clock.interpreted else 256
    found: list[Row] = []
    for support in args.supports:
        queries, keys = case(rows, d_sae, d_in, support, clock)
        scores = queries @ keys.T
        rules: dict[str, RowRule] = {
            "sparsemax": Sparsemax(), "entmax 1.5": Entmax(1.5), "topk": TopK(support), "threshold": Threshold(0.5),
        }  # fmt: skip
        for name, rule in rules.items():
            mine, exact = kernels.select_rows(scores, rule), kernels.reference.select(scores.double(), rule)
            found.append(_agreement(f"{name}, support {support}", scores, mine, exact, 1e-5))
        described = gpu_select.describe(Sparsemax(), d_sae, clock.device)
        plan = _plan(clock)
        queries, keys = queries.to(half(clock)), keys.to(half(clock))
        mine = gpu_scores.select_unwritten(queries, keys, described, None, plan)
        if mine is not None:
            scores = queries.float() @ keys.float().T
            exact = kernels.reference.select(queries.double() @ keys.double().T, Sparsemax())
            found.append(_agreement(f"sparsemax, scores not written, support {support}", scores, mine, exact, 1e-4))
    odd = torch.zeros(6, d_sae, device=clock.device)
    odd[1, 3], odd[2, 5], odd[3], odd[4] = float("nan"), float("inf"), -float("inf"), torch.arange(d_sae) / d_sae
    mine, exact = kernels.select_rows(odd, Sparsemax()), kernels.reference.select(odd.double(), Sparsemax())
    found.append(_agreement("all equal, NaN, infinities", odd.nan_to_num(0, 0, 0), mine, exact, 1e-5))
    found += [_gradients(args, clock, dictionary) for dictionary in ("concepts", "linear")]
    wrong = [row for row in found if not row["error"] <= row["allowed"]]
    if wrong:
        raise SystemExit(f"not exact: {wrong}")
    return found


def _plan(clock: Clock) -> gpu_plan.GemmPlan:
    small = gpu_plan.GemmPlan(step=4, rows=16, latents=32, depth=16, band=2, warps=4, stages=2, cap=64)
    return small if clock.interpreted else gpu_plan.GEMM_PLAN


def _agreement(name: str, scores: Tensor, mine: Support, exact: Support, allowed: float) -> Row:
    """Largest distance from the threshold, relative to the scores, of an entry that only one of the two selected."""
    shape = scores.shape
    chosen = torch.zeros(2, *shape, dtype=torch.bool, device=scores.device)
    for mask, support in zip(chosen, (mine, exact), strict=True):
        mask[rows_of(support.offsets, support.indices.numel()), support.indices] = True
    differs = chosen[0] != chosen[1]
    gap = (scores.double() - exact.threshold[:, None]).abs().nan_to_num(0, 0, 0)
    scale = scores.abs().amax(1, keepdim=True).clamp(min=1)
    return {"check": name, "l0": l0(mine), "error": float((gap / scale * differs).max()), "allowed": allowed}


def _gradients(args: argparse.Namespace, clock: Clock, dictionary: str) -> Row:
    """Reconstruction and all gradients of an SAE in float32 against float64 on the same support."""
    d_sae, d_in, rows = min(args.d_sae[0], 3_072), args.d_in[0], 3 if clock.interpreted else 256
    sae = SAE(d_in, d_sae, dictionary, device=clock.device)
    wide = SAE(d_in, d_sae, dictionary, device=clock.device, dtype=torch.float64)
    wide.load_state_dict(sae.state_dict())
    x = torch.randn(rows, d_in, device=clock.device)
    stages = sae.encode_stages(x)
    recons = sae.decode(stages.codes)
    (recons - x).square().sum().backward()
    prepared = wide.dictionary.prepare(x.double())
    support = stages.support._replace(scores=None)
    scores = wide.dictionary.scores(prepared, support)
    codes = stages.codes.with_values(scores)
    exact = wide.dictionary.decode(codes.__class__(*_fields(codes, prepared.scale)))
    (exact - x.double()).square().sum().backward()
    pairs = [(recons, exact), *((p.grad, q.grad) for p, q in zip(sae.parameters(), wide.parameters(), strict=True))]
    error = max(float((a.detach().double() - b.detach()).norm() / b.detach().norm().clamp(min=1e-30)) for a, b in pairs)
    return {"check": f"{dictionary}: recons and gradients", "l0": l0(support), "error": error, "allowed": 1e-4}


def _fields(codes: Any, scale: Tensor | None) -> tuple[Any, ...]:
    return codes.indices, codes.values, codes.offsets, codes.shape, codes.d_sae, scale


# ------------------------------------------------------------------- sections


def selected(args: argparse.Namespace, clock: Clock, d_in: int, d_sae: int) -> list[Row]:
    """Selection on given scores against torch.topk, torch.sort and one pass of amax."""
    found = []
    for support in args.supports:
        queries, keys = case(args.rows, d_sae, d_in, support, clock)
        scores, k = torch.mm(queries, keys.T), min(TOPK, d_sae)
        room = kernels.capacity(args.rows * 8 * support)
        with room:
            jobs: dict[str, Callable[[], Any]] = {
                "saehooks sparsemax": lambda scores=scores: kernels.select_rows(scores, Sparsemax()),
                "saehooks topk": lambda scores=scores, k=k: kernels.select_rows(scores, TopK(k)),
                "torch.amax": lambda scores=scores: scores.amax(1),
                "torch.topk": lambda scores=scores, k=k: scores.topk(k, dim=1),
            }
            if support == args.supports[0]:
                jobs["torch.sort"] = lambda scores=scores: scores.sort(dim=1)
            ms = {f"{name} ms": tried(name, lambda job=job: clock.ms(job)) for name, job in jobs.items()}
        mine = ms["saehooks sparsemax ms"]
        row = {"d_sae": d_sae, "d_in": d_in, "support": support, "l0": l0(kernels.select_rows(scores, Sparsemax()))}
        row |= {"torch.sort ms": None} | ms
        row["/ topk"], row["/ amax"] = ratio(mine, ms["torch.topk ms"]), ratio(mine, ms["torch.amax ms"])
        found.append(row)
        del scores
    return found


def scored(args: argparse.Namespace, clock: Clock, d_in: int, d_sae: int) -> list[Row]:
    """Product and selection together against the vendor's product alone, scores written and not."""
    found, dtype = [], half(clock)
    for support in args.supports:
        queries, keys = (tensor.to(dtype) for tensor in case(args.rows, d_sae, d_in, support, clock))
        described = gpu_select.describe(Sparsemax(), d_sae, clock.device)
        out = torch.empty(args.rows, d_sae, dtype=dtype, device=clock.device)
        product = tried("product", lambda q=queries, k=keys, out=out: clock.ms(lambda: torch.mm(q, k.T, out=out)))
        del out
        with kernels.capacity(args.rows * 8 * support) as room:
            written = tried("written", lambda q=queries, k=keys: clock.ms(lambda: kernels.select(q, k, Sparsemax())))
            room.reset()
            unwritten = tried(
                "unwritten",
                lambda q=queries, k=keys, rule=described: clock.ms(
                    lambda: gpu_scores.select_unwritten(q, k, rule, None, _plan(clock))
                ),
            )
            lost = room.overflowed
        found.append(
            {
                "d_sae": d_sae, "d_in": d_in, "support": support, "product ms": product, "written ms": written,
                "unwritten ms": unwritten, "written / product": ratio(written, product),
                "unwritten / product": ratio(unwritten, product), "unwritten overflowed": lost,
                "TFLOP/s": ratio(2e-9 * args.rows * d_sae * d_in, product),
            }
        )  # fmt: skip
    return found


def decoded(args: argparse.Namespace, clock: Clock, d_in: int, d_sae: int) -> list[Row]:
    """The sparse products against dense ones of the same shape in half precision."""
    found, dtype = [], half(clock)
    for support in args.supports:
        queries, keys = case(args.rows, d_sae, d_in, support, clock)
        chosen = kernels.select(queries, keys, Sparsemax())
        values, path = torch.randn(chosen.indices.numel(), device=clock.device), kernels.path(queries)
        entries = chosen.indices, chosen.offsets
        dense = torch.randn(args.rows, d_sae, dtype=dtype, device=clock.device)
        table = keys.to(dtype)
        jobs: dict[str, Callable[[], Any]] = {
            "spmm": lambda v=values, e=entries, k=keys, path=path: path.spmm(v, *e, k),
            "sddmm": lambda q=queries, e=entries, k=keys, path=path: path.sddmm(q, k, *e),
            "spmm_transposed": lambda v=values, e=entries, q=queries, path=path: path.spmm_transposed(
                v, e[0].clone(), e[1], q, d_sae
            ),
            "dense": lambda dense=dense, table=table: dense @ table,
        }
        ms = {f"{name} ms": tried(name, lambda job=job: clock.ms(job)) for name, job in jobs.items()}
        gathered = chosen.indices.numel() * d_in * keys.element_size()
        row = {"d_sae": d_sae, "d_in": d_in, "support": support, "l0": l0(chosen), **ms}
        row["spmm / dense"] = ratio(ms["spmm ms"], ms["dense ms"])
        row["gathered GB/s"] = ratio(gathered * 1e-6, ms["spmm ms"])
        found.append(row)
        del dense
    return found


def stepped(args: argparse.Namespace, clock: Clock, d_in: int, d_sae: int) -> list[Row]:
    """Forward and backward, and with Adam, against the encoder's product and the steps of others."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # products in bfloat16 with float32 sums, on both sides
    try:
        return [_step(args, clock, d_in, d_sae, support) for support in args.supports]
    finally:
        torch.set_float32_matmul_precision(before)


def _step(args: argparse.Namespace, clock: Clock, d_in: int, d_sae: int, support: int) -> Row:
    queries, keys = case(args.rows, d_sae, d_in, support, clock)
    scale = float(queries.norm(dim=1).mean())
    x = queries + 0.0
    row: Row = {"d_sae": d_sae, "d_in": d_in, "support": support}
    row["product ms"] = tried("product", lambda: _product(queries.to(half(clock)), keys.to(half(clock)), clock))
    row |= tried("saehooks", lambda: _ours(args, clock, x, keys, scale, support)) or {}
    if support == args.supports[0]:
        makers = {
            "SAELens topk": lambda: SAELensTopK(d_in, d_sae, min(TOPK, d_sae), clock.device),
            "sparsify topk": lambda: SparsifyTopK(d_in, d_sae, min(TOPK, d_sae), clock.device),
            "published sparsemax": lambda: PublishedSparsemax(keys, scale),
        }
        for name, make in makers.items():
            theirs = tried(name, lambda make=make: _theirs(make(), x, clock)) or (None, None, None)
            row[f"{name} fb ms"], row[f"{name} step ms"], row[f"{name} peak MB"] = theirs
            row[f"{name} fb / ours"] = ratio(theirs[0], row.get("saehooks fb ms"))
    row["fb / product"] = ratio(row.get("saehooks fb ms"), row["product ms"])
    row["M tokens/s"] = ratio(args.rows * 1e-3, row.get("saehooks step ms"))
    return row


def _product(queries: Tensor, keys: Tensor, clock: Clock) -> float | None:
    return clock.ms(lambda: queries @ keys.T)


def _ours(args: argparse.Namespace, clock: Clock, x: Tensor, keys: Tensor, scale: float, support: int) -> Row:
    """Eager and as a CUDA graph, with torch's fused Adam and with the update that never writes gradients."""
    sae = SAE(x.shape[1], keys.shape[0], device=clock.device, key_scale=scale, center=False)
    with torch.no_grad():
        sae.dictionary.C.copy_(keys)
    fused, plain = TableAdam(sae, lr=1e-6), torch.optim.Adam(sae.parameters(), lr=1e-6, fused=True)
    if not clock.interpreted:
        plain = torch.optim.Adam(sae.parameters(), lr=1e-6, fused=True, capturable=True)

    def backward() -> None:
        sae.zero_grad(set_to_none=True)
        (sae(x).recons - x).square().sum().backward()

    def step_plain() -> None:
        backward()
        plain.step()

    def step_fused() -> None:
        fused.zero_grad()
        with fused.deferring():
            (sae(x).recons - x).square().sum().backward()
        fused.step()

    row: Row = {"saehooks eager fb ms": clock.ms(backward)}
    with kernels.capacity(args.rows * 4 * support) as room:
        row["saehooks fb ms"] = clock.ms(graphed(backward, clock))
        row["saehooks plain Adam step ms"] = clock.ms(graphed(step_plain, clock))
        row["saehooks step ms"] = clock.ms(graphed(step_fused, clock))
        row["saehooks peak MB"] = clock.peak_mb(step_fused)
        row["l0"] = room.used / args.rows
        if room.overflowed:
            raise SystemExit(f"more entries than the capacity holds: {room.used}")
    return row


def _theirs(model: nn.Module, x: Tensor, clock: Clock) -> tuple[float | None, float | None, float | None]:
    """Forward and backward, a whole step, and its peak memory."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, fused=True)

    def backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(clock.device.type, torch.bfloat16, enabled=not clock.interpreted):
            loss = model(x)
        loss.backward()

    def step() -> None:
        backward()
        optimizer.step()

    return clock.ms(backward), clock.ms(step), clock.peak_mb(step)


# -------------------------------------------------------------------- attached


def attached(args: argparse.Namespace, clock: Clock) -> list[Row]:
    """A read and a splice at half depth of a bfloat16 transformer in plain torch, against its forward."""
    from saehooks import read, splice

    d_in, depth, d_sae = args.d_in[0], 2 if clock.interpreted else 12, min(args.d_sae)
    d_sae = d_sae if clock.interpreted else 24_576
    layers = [
        nn.TransformerEncoderLayer(d_in, max(1, d_in // 64), 4 * d_in, dropout=0.0, batch_first=True, norm_first=True)
        for _ in range(depth)
    ]
    model = nn.Sequential(*layers).to(clock.device, half(clock)).eval()
    shape = (1, 5, d_in) if clock.interpreted else (16, 256, d_in)
    x = torch.randn(shape, device=clock.device).to(half(clock))
    queries, keys = case(64 if not clock.interpreted else 4, d_sae, d_in, args.supports[0], clock)
    sae = SAE(d_in, d_sae, device=clock.device, key_scale=float(queries.norm(dim=1).mean()))
    with torch.no_grad():
        sae.dictionary.C.copy_(keys)
        plain = clock.ms(lambda: model(x))
        row: Row = {
            "d_sae": d_sae,
            "d_in": d_in,
            "layers": depth,
            "tokens": x.shape[0] * x.shape[1],
            "forward ms": plain,
        }
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            for name, verb in (("read", read), ("splice", splice)):
                with verb(model, sae, at=f"{depth // 2}") as trace:
                    row[f"{name} ms"] = clock.ms(lambda: model(x))
                    row[f"{name} / forward"] = ratio(row[f"{name} ms"], plain)
                row["l0"] = float(trace.support_size.double().mean())
        finally:
            torch.set_float32_matmul_precision(before)
    return [row]
