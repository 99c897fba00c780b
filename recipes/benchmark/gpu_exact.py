"""The GPU benchmark's first section: every kernel against float64."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from gpu_clock import Clock
from gpu_measure import Found, Row, case, gemm_plan, half, l0
from torch import Tensor

from saehooks import SAE, kernels
from saehooks.codes import Codes, rows_of
from saehooks.kernels import (
    BatchTopK,
    Entmax,
    RowRule,
    Sparsemax,
    Support,
    Threshold,
    TopK,
    gpu_batch,
    gpu_scores,
    gpu_select,
)


def checked(args: argparse.Namespace, clock: Clock) -> Found:
    """Every kernel against float64, on fresh random inputs; what is wrong counts as failed."""
    d_in, d_sae = args.reference
    rows = min(args.rows, 256)
    found: list[Row] = []
    for support in args.supports:
        queries, keys = case(rows, d_sae, d_in, support, clock)
        scores = queries @ keys.T
        found += [*_selections(scores, support), _batch(scores, support)]
        found += _unwritten(queries.to(half(clock)), keys.to(half(clock)), support, clock)
    odd = torch.zeros(6, d_sae, device=clock.device)
    odd[1, 3], odd[2, 5], odd[3], odd[4] = float("nan"), float("inf"), -float("inf"), torch.arange(d_sae) / d_sae
    mine, exact = kernels.select_rows(odd, Sparsemax()), kernels.reference.select(odd.double(), Sparsemax())
    found.append(agreement("all equal, NaN, infinities", odd.nan_to_num(0, 0, 0), mine, exact, 1e-5))
    found += [_gradients(rows, d_in, min(d_sae, 3_072), clock, dictionary) for dictionary in ("concepts", "linear")]
    for row in found:
        if not row["error"] <= row["allowed"]:
            clock.fail(f"NOT EXACT, {row['check']}", f"{row['error']:.1e}, allowed {row['allowed']:.1e}")
    return {"exact": found}


def _selections(scores: Tensor, support: int) -> list[Row]:
    rules: dict[str, RowRule] = {
        "sparsemax": Sparsemax(), "entmax 1.5": Entmax(1.5), "topk": TopK(support), "threshold": Threshold(0.5),
    }  # fmt: skip
    found = []
    for name, rule in rules.items():
        mine, exact = kernels.select_rows(scores, rule), kernels.reference.select(scores.double(), rule)
        found.append(agreement(f"{name}, support {support}", scores, mine, exact, 1e-5))
    return found


def _batch(scores: Tensor, support: int) -> Row:
    rows, d_sae = scores.shape
    described = gpu_select.describe(BatchTopK(support), d_sae, scores.device)
    exact = kernels.batch_topk([scores.double()], support * rows, rows, d_sae, scores.device)
    return agreement(f"batch topk, support {support}", scores, gpu_batch.select_batch(scores, described), exact, 1e-5)


def _unwritten(queries: Tensor, keys: Tensor, support: int, clock: Clock) -> list[Row]:
    described = gpu_select.describe(Sparsemax(), keys.shape[0], clock.device)
    mine = gpu_scores.select_unwritten(queries, keys, described, None, gemm_plan(clock))
    if mine is None:  # a row had too many candidates, so that the scores have to be written
        return []
    exact = kernels.reference.select(queries.double() @ keys.double().T, Sparsemax())
    scores = queries.float() @ keys.float().T
    return [agreement(f"sparsemax, scores not written, support {support}", scores, mine, exact, 1e-4)]


def agreement(name: str, scores: Tensor, mine: Support, exact: Support, allowed: float) -> Row:
    """Largest distance from the threshold, relative to the scores, of an entry that only one of the two selected."""
    chosen = torch.zeros(2, *scores.shape, dtype=torch.bool, device=scores.device)
    for mask, support in zip(chosen, (mine, exact), strict=True):
        used = int(support.offsets[-1])
        mask[rows_of(support.offsets, used), support.indices[:used]] = True
    differs = chosen[0] != chosen[1]
    gap = (scores.double() - exact.threshold[:, None]).abs().nan_to_num(0, 0, 0)
    scale = scores.abs().amax(1, keepdim=True).clamp(min=1)
    return {"check": name, "l0": l0(mine), "error": float((gap / scale * differs).max()), "allowed": allowed}


def _gradients(rows: int, d_in: int, d_sae: int, clock: Clock, dictionary: str) -> Row:
    """Reconstruction and all gradients of an SAE in float32 against float64 on the same support."""
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
    exact = wide.dictionary.decode(_with(stages.codes, scores, prepared.scale))
    (exact - x.double()).square().sum().backward()
    pairs = [(recons, exact), *((p.grad, q.grad) for p, q in zip(sae.parameters(), wide.parameters(), strict=True))]
    error = max(float((a.detach().double() - b.detach()).norm() / b.detach().norm().clamp(min=1e-30)) for a, b in pairs)
    return {"check": f"{dictionary}: recons and gradients", "l0": l0(support), "error": error, "allowed": 1e-4}


def _with(codes: Codes, values: Tensor, scale: Any) -> Codes:
    return Codes(codes.indices, values, codes.offsets, codes.shape, codes.d_sae, scale)
