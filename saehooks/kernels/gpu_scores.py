"""Host side of scoring on the GPU: in which precision queries meet keys, and whether the scores are written at all.

Float32 SAEs follow torch's own switch: ``torch.set_float32_matmul_precision("medium")`` scores in bfloat16 with
float32 sums, ``"high"`` in TF32, ``"highest"`` (the default) in float32. Under "medium" a training step also decodes
from the bfloat16 copy of the table that it scored with. Half-precision SAEs score as they are, with float32 sums.
Scores are never rounded to half precision before selection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saehooks.kernels import triton_gemm
from saehooks.kernels.capacity import active
from saehooks.kernels.copies import bfloat16_is_wanted, shared_copy
from saehooks.kernels.gpu_batch import select_batch
from saehooks.kernels.gpu_launch import on
from saehooks.kernels.gpu_plan import GEMM_PLAN, GemmPlan, score_rows, select_plan, writes_scores
from saehooks.kernels.gpu_select import Candidates, Rule, Target, collect, describe, incomplete, select_scores, settle
from saehooks.kernels.rules import BatchRule, BatchTopK, RowRule, Support
from saehooks.kernels.triton_select import THRESHOLD

HALF = (torch.bfloat16, torch.float16)

HAS_OUT_DTYPE = "dtype_out" in torch.ops.aten.mm.overloads()
"""Whether this torch multiplies half-precision matrices into a float32 one."""


def select_products(
    queries: Tensor, keys: Tensor, rule: RowRule | BatchRule, bias: Tensor | None = None
) -> list[Support] | None:
    """Supports of consecutive rows, from their scores against all keys; None where the reference has to do it.

    That is in float64, for feature choice, and for batch top-k over more scores than SCORE_BYTES in `gpu_plan` hold.
    """
    rows, d_sae = queries.shape[0], keys.shape[0]
    if torch.float64 in (queries.dtype, keys.dtype) or not (queries.numel() and keys.numel()):
        return None
    described, across = describe(rule, d_sae, queries.device), isinstance(rule, BatchTopK)
    if described is None or (across and score_rows(rows, d_sae) < rows):
        return None
    queries, keys = operands(queries.detach(), keys.detach())
    bias = None if bias is None else bias.detach().float().contiguous()
    with on(queries, keys, *([] if bias is None else [bias])):
        if not across:
            return _by_row(queries, keys, described, bias)
        scores = torch.empty(rows, d_sae, dtype=torch.float32, device=queries.device)
        return [select_batch(product(queries, keys, scores), described, bias)]


def _by_row(queries: Tensor, keys: Tensor, rule: Rule, bias: Tensor | None) -> list[Support]:
    """Supports under a row rule, from scores that are written chunk by chunk, or not at all."""
    rows, d_sae = queries.shape[0], keys.shape[0]
    if queries.dtype in HALF and rule.kind != THRESHOLD.value and not writes_scores(rows, d_sae, rule.k):
        found = select_unwritten(queries, keys, rule, bias)
        if found is not None:
            return [found]
    step = score_rows(rows, d_sae)
    buffer = torch.empty(step, d_sae, dtype=torch.float32, device=queries.device)
    return select_scores((product(part, keys, buffer[: part.shape[0]]) for part in queries.split(step)), rule, bias)


def operands(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys in the dtype they are multiplied in."""
    if queries.dtype == keys.dtype and queries.dtype in HALF:
        return queries, keys
    dtype = torch.bfloat16 if bfloat16_is_wanted() else torch.float32
    return queries.to(dtype), shared_copy(keys).to(dtype)


def product(queries: Tensor, keys: Tensor, out: Tensor) -> Tensor:
    """Scores (rows, d_sae) in float32, into ``out``."""
    if queries.dtype == torch.float32:
        return torch.mm(queries, keys.T, out=out)
    if queries.device.type != "cuda":
        return torch.mm(queries.float(), keys.float().T, out=out)
    if HAS_OUT_DTYPE:
        return torch.mm(queries, keys.T, out_dtype=torch.float32, out=out)
    # Half-precision numbers are exact in TF32, which the tensor cores multiply with float32 sums.
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return torch.mm(queries.float(), keys.float().T, out=out)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def select_unwritten(
    queries: Tensor, keys: Tensor, rule: Rule, bias: Tensor | None, plan: GemmPlan = GEMM_PLAN
) -> Support | None:
    """Select without writing the scores; None if a row had too many candidates, so that they must be written.

    Under a `capacity`, where the host does not look, such a step counts as overflowed.
    """
    rows, d_sae = queries.shape[0], keys.shape[0]
    sampled = keys[:: plan.step]
    scores = torch.empty(rows, sampled.shape[0], dtype=torch.float32, device=queries.device)
    bias_sampled = None if bias is None else bias[:: plan.step].contiguous()
    selection = select_plan(sampled.shape[0], rule.k)._replace(cap=plan.cap)
    found = collect(product(queries, sampled, scores), rule, selection, bias_sampled, plan.step)
    if d_sae > sampled.shape[0]:
        _append(queries, keys, bias, found, plan)
    triton_gemm.order[(rows,)](*found[:4], CAP=selection.cap, num_warps=selection.finish_warps)
    room, lost = active(), incomplete(found)
    if room is None:
        return None if bool(lost) else settle(found, rule, selection)
    room.note(lost)
    target = Target.of(room, queries.device)
    return target.whole([settle(found, rule, selection, target=target)], room)


def _append(queries: Tensor, keys: Tensor, bias: Tensor | None, found: Candidates, plan: GemmPlan) -> None:
    """Score all other latents and list those that reach their row's bound."""
    queries, keys = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (queries, keys))
    rows, width = queries.shape
    others = keys.shape[0] - -(-keys.shape[0] // plan.step)
    tiles = -(-rows // plan.rows) * -(-others // plan.latents)
    triton_gemm.scores_above[(tiles,)](
        queries, queries.stride(0), keys, keys.stride(0), found.best if bias is None else bias, found.bound,
        found.values, found.places, found.counts, rows, others, width,
        STEP=plan.step, BIASED=bias is not None, CAP=found.values.shape[1],
        ROWS=plan.rows, LATENTS=plan.latents, DEPTH=plan.depth, BAND=plan.band,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
