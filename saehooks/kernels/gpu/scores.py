"""Host side of scoring on the GPU: in which precision queries meet keys, and whether the scores are written at all.

Float32 SAEs follow torch's own switch: ``torch.set_float32_matmul_precision("medium")`` scores in bfloat16 with
float32 sums, ``"high"`` in TF32, ``"highest"`` (the default) in float32. Under "medium" a training step also decodes
from the bfloat16 copy of the table that it scored with. Half-precision SAEs score as they are, with float32 sums.
Scores are never rounded to half precision before selection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saehooks.kernels import reference
from saehooks.kernels.gpu.across_rows import select_batch
from saehooks.kernels.gpu.launch import (
    GEMM_PLAN,
    GemmPlan,
    SelectPlan,
    on,
    product_plan,
    score_rows,
    screens,
    select_plan,
    writes_scores,
)
from saehooks.kernels.gpu.select import (
    THRESHOLD,
    Candidates,
    RuleNumbers,
    Target,
    collect,
    describe,
    incomplete,
    select_rows,
    select_scores,
    support_of_candidates,
)
from saehooks.kernels.gpu.thresholds import finite
from saehooks.kernels.reference.select import join
from saehooks.kernels.rules import BatchRule, BatchTopK, RowRule
from saehooks.kernels.step import DEFAULT, Step, bfloat16_is_wanted
from saehooks.support import Support

HALF = (torch.bfloat16, torch.float16)

SMALLEST, LARGEST = 1e-12, 1e18
"""Norms between which rounding errors are bounded: beyond, squares underflow or products overflow."""

HAS_OUT_DTYPE = "dtype_out" in torch.ops.aten.mm.overloads()
"""Whether this torch multiplies half-precision matrices into a float32 one."""


def select_products(
    queries: Tensor, keys: Tensor, rule: RowRule | BatchRule, bias: Tensor | None = None, step: Step = DEFAULT
) -> Support:
    """Support of the scores ``queries (rows, d) @ keys.T (d, d_sae) + bias (d_sae,)``.

    The reference serves float64, feature choice, and batch top-k over more scores than SCORE_BYTES in `launch` hold.
    """
    rows, d_sae = queries.shape[0], keys.shape[0]
    described = describe(rule, d_sae, queries.device)
    across = isinstance(rule, BatchTopK)
    if (
        described is None
        or torch.float64 in (queries.dtype, keys.dtype)
        or not (queries.numel() and keys.numel())
        or (across and score_rows(rows, d_sae) < rows)
    ):
        return reference.select_products(queries, keys, rule, bias, step.exact(), by_row=select_rows)
    queries, keys = operands(queries.detach(), keys.detach(), step)
    bias = None if bias is None else bias.detach().float().contiguous()
    with on(queries, keys, *([] if bias is None else [bias])):
        if not across:
            return join(_by_row(queries, keys, described, bias, step), keys)
        scores = torch.empty(rows, d_sae, dtype=torch.float32, device=queries.device)
        return select_batch(product(queries, keys, scores), described, bias, step)


def _by_row(queries: Tensor, keys: Tensor, rule: RuleNumbers, bias: Tensor | None, step: Step) -> list[Support]:
    """Supports under a row rule, from scores that are written chunk by chunk, or not at all."""
    rows, d_sae = queries.shape[0], keys.shape[0]
    found = None
    if queries.dtype in HALF and rule.kind != THRESHOLD.value and not writes_scores(rows, d_sae, rule.k):
        found = select_unwritten(queries, keys, rule, bias, step)
    elif queries.dtype == torch.float32 and rule.kind != THRESHOLD.value and screens(rows, d_sae, rule.k):
        found = select_screened(queries, keys, rule, bias, step)
    if found is not None:
        return [found]
    chunk = score_rows(rows, d_sae)
    buffer = torch.empty(chunk, d_sae, dtype=torch.float32, device=queries.device)
    scores = (product(part, keys, buffer[: part.shape[0]]) for part in queries.split(chunk))
    return select_scores(scores, rule, bias, step)


def operands(queries: Tensor, keys: Tensor, step: Step = DEFAULT) -> tuple[Tensor, Tensor]:
    """Queries (rows, d) and keys (d_sae, d) in the dtype they are multiplied in."""
    if queries.dtype == keys.dtype and queries.dtype in HALF:
        return queries, keys
    dtype = torch.bfloat16 if bfloat16_is_wanted() else torch.float32
    return queries.to(dtype), step.table(keys).to(dtype)


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
    queries: Tensor,
    keys: Tensor,
    rule: RuleNumbers,
    bias: Tensor | None,
    step: Step = DEFAULT,
    plan: GemmPlan = GEMM_PLAN,
) -> Support | None:
    """Select for queries (rows, d) without writing the scores; None if a row had too many candidates for that.

    Under a `Capacity`, where the host does not look, such a step counts as overflowed.
    """
    found, selection = _sample(queries, keys, rule, bias, plan)
    if keys.shape[0] > -(-keys.shape[0] // plan.step):
        _append(queries, keys, bias, found, plan)
    return _settle(found, rule, selection, step)


def _sample(
    queries: Tensor, keys: Tensor, rule: RuleNumbers, bias: Tensor | None, plan: GemmPlan
) -> tuple[Candidates, SelectPlan]:
    """Candidates among every step-th latent, whose bound holds for all, and the launch shape that lists them."""
    sampled = keys[:: plan.step]
    scores = torch.empty(queries.shape[0], sampled.shape[0], dtype=torch.float32, device=queries.device)
    bias_sampled = None if bias is None else bias[:: plan.step].contiguous()
    selection = select_plan(sampled.shape[0], rule.k)._replace(cap=plan.cap)
    return collect(product(queries, sampled, scores), rule, selection, bias_sampled, plan.step), selection


def _settle(found: Candidates, rule: RuleNumbers, selection: SelectPlan, step: Step) -> Support | None:
    """The support of complete lists; None, or under a `Capacity` an overflow, if one is not complete."""
    rows = found.counts.shape[0]
    order_kernel[(rows,)](*found[:4], CAP=selection.cap, num_warps=selection.finish_warps)
    room, lost = step.capacity, incomplete(found)
    if room is None:
        return None if bool(lost) else support_of_candidates(found, rule, selection)
    room.note(lost)
    target = Target.of(room, found.best.device)
    return target.whole([support_of_candidates(found, rule, selection, target=target)], room)


def select_screened(
    queries: Tensor,
    keys: Tensor,
    rule: RuleNumbers,
    bias: Tensor | None,
    step: Step = DEFAULT,
    plan: GemmPlan = GEMM_PLAN,
) -> Support | None:
    """Select from float32 scores of the candidates alone, which products in bfloat16 have found; None as above.

    A row's scores in bfloat16 are off by at most ``error``: by Cauchy-Schwarz, for queries q and keys k rounded to q'
    and k', ``|q - q'| max|k| + |q'| max|k - k'|``, and what sums in float32 lose. So the threshold of the sampled
    scores is too large by no more than that, and whatever may be selected reaches it less twice the error.
    """
    half_queries, half_keys = queries.to(torch.bfloat16), keys.to(torch.bfloat16)
    error = _screen_errors(queries, half_queries, keys, half_keys, bias)
    found, selection = _sample(half_queries, half_keys, rule, bias, plan)
    # Rows without a bound, NaN and infinity among them, list everything, and are incomplete.
    lowered = found.bound - 2 * error - 1e-6 * found.bound.abs()
    found = found._replace(bound=torch.where(lowered.isfinite(), lowered, -torch.inf))
    found.counts.zero_()
    if queries.device.type != "cuda":  # Triton's interpreter multiplies no bfloat16
        half_queries, half_keys = half_queries.float(), half_keys.float()
    _append(half_queries, half_keys, bias, found, plan._replace(step=0))
    width = product_plan(queries.shape[1])
    queries, keys = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (queries, keys))
    rescore_kernel[(queries.shape[0],)](
        queries, queries.stride(0), keys, keys.stride(0), found.best if bias is None else bias,
        found.values, found.places, found.counts, queries.shape[1],
        BIASED=bias is not None, CAP=selection.cap, WIDTH=width.width, ENTRIES=width.entries, num_warps=width.warps,
    )  # fmt: skip
    return _settle(found, rule, selection, step)


def _screen_errors(
    queries: Tensor, half_queries: Tensor, keys: Tensor, half_keys: Tensor, bias: Tensor | None
) -> Tensor:
    """(rows,) float32, the most that a score of rounded queries and keys is off; not finite where that is not known."""

    def norms(rows: Tensor, half: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rounded = half.float()
        return rows.norm(dim=1), (rows - rounded).norm(dim=1), rounded.norm(dim=1)

    whole, lost, left = norms(queries, half_queries)
    key, key_lost, key_left = (norm.max() for norm in norms(keys, half_keys))
    summing = queries.shape[1] * 2.0**-23  # twice the relative error of a float32 sum
    error = (lost * key + left * key_lost) * (1 + 1e-3) + summing * (left * key_left + whole * key)
    if bias is not None:
        error = error + 2.0**-22 * bias.abs().max()
    usable = (whole > SMALLEST) & (whole < LARGEST) & (key > SMALLEST) & (key < LARGEST)
    return torch.where(usable, error + 1e-16 * (whole + left + key), torch.inf)


def _append(queries: Tensor, keys: Tensor, bias: Tensor | None, found: Candidates, plan: GemmPlan) -> None:
    """Score all latents that were not sampled (all, with step 0) and list those that reach their row's bound."""
    queries, keys = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (queries, keys))
    rows, width = queries.shape
    others = keys.shape[0] - (-(-keys.shape[0] // plan.step) if plan.step else 0)
    tiles = -(-rows // plan.rows) * -(-others // plan.latents)
    scores_above_kernel[(tiles,)](
        queries, queries.stride(0), keys, keys.stride(0), found.best if bias is None else bias, found.bound,
        found.values, found.places, found.counts, rows, others, width,
        STEP=plan.step, BIASED=bias is not None, CAP=found.values.shape[1],
        ROWS=plan.rows, LATENTS=plan.latents, DEPTH=plan.depth, BAND=plan.band,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip


# ---------------------------------------------------------------- Triton kernels

# The score product without its output: only scores that reach their row's bound leave the kernel.
#
# The bound of a row comes from every STEP-th latent, scored beforehand: the threshold of any subset bounds the row's
# own from below. Hits are appended to the row's list by an integer atomic, so their order varies; `order` sorts each
# list by latent before anything is summed, so results do not.


@triton.jit(do_not_specialize=["rows"])  # which changes with the batch
def scores_above_kernel(
    QUERIES, query_stride, KEYS, key_stride, BIAS, BOUND, VALUES, PLACES, COUNTS, rows, others, width,
    STEP: tl.constexpr, BIASED: tl.constexpr, CAP: tl.constexpr,
    ROWS: tl.constexpr, LATENTS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One tile of queries against the latents that are no multiple of STEP (0: all); scores that reach the bound are
    listed."""
    row_tiles = tl.cdiv(rows, ROWS)
    latent_tiles = tl.cdiv(others, LATENTS)
    # Bands of BAND row tiles: their queries and the same few keys stay in the L2 cache.
    band = tl.program_id(0) // (BAND * latent_tiles)
    within = tl.program_id(0) % (BAND * latent_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    row = (band * BAND + within % height) * ROWS + tl.arange(0, ROWS)
    other = (within // height) * LATENTS + tl.arange(0, LATENTS)
    latent = other
    if STEP:
        latent = other + other // (STEP - 1) + 1
    depth = tl.arange(0, DEPTH)
    # Out of range: read the last row again; its hits are masked below.
    query_at = QUERIES + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * query_stride + depth[None, :]
    last = others - 1
    if STEP:
        last = last + last // (STEP - 1) + 1
    key_row = tl.where(other < others, latent, last)
    key_at = KEYS + key_row.to(tl.int64)[None, :] * key_stride + depth[:, None]
    z = tl.zeros((ROWS, LATENTS), tl.float32)
    for begin in range(0, width, DEPTH):
        inside = begin + depth < width
        query = tl.load(query_at + begin, mask=inside[None, :], other=0.0)
        key = tl.load(key_at + begin, mask=inside[:, None], other=0.0)
        z = tl.dot(query, key, z, input_precision="ieee")
    if BIASED:
        z += tl.load(BIAS + key_row)[None, :]
    bound = tl.load(BOUND + row, mask=row < rows, other=float("inf"))
    real = (row < rows)[:, None] & (other < others)[None, :]
    # Not "z >= bound": a NaN on either side must be seen.
    hit = real & ((z < bound[:, None]) == 0)
    if tl.sum(tl.sum(hit.to(tl.int32), 1), 0) > 0:
        N: tl.constexpr = ROWS * LATENTS
        flat = tl.reshape(z, (N,))
        hits = tl.reshape(hit, (N,))
        rows_of = tl.reshape(row[:, None] + tl.zeros((ROWS, LATENTS), tl.int32), (N,)).to(tl.int64)
        place = tl.reshape(latent[None, :] + tl.zeros((ROWS, LATENTS), tl.int32), (N,))
        slot = tl.atomic_add(COUNTS + rows_of, 1, mask=hits, sem="relaxed")
        kept = hits & (slot < CAP)
        tl.store(VALUES + rows_of * CAP + slot, flat, mask=kept)
        tl.store(PLACES + rows_of * CAP + slot, place, mask=kept)


@triton.jit
def rescore_kernel(
    QUERIES, query_stride, KEYS, key_stride, BIAS, VALUES, PLACES, COUNTS, width,
    BIASED: tl.constexpr, CAP: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Float32 scores of the latents that a row lists, in place of those it was listed for."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.minimum(tl.load(COUNTS + row), CAP)
    lane = tl.arange(0, WIDTH)
    for start in range(0, n, ENTRIES):
        slot = start + tl.arange(0, ENTRIES)
        place = tl.load(PLACES + row * CAP + slot, mask=slot < n, other=0).to(tl.int64)
        total = tl.zeros((ENTRIES,), tl.float32)
        for begin in range(0, width, WIDTH):
            inside = begin + lane < width
            query = tl.load(QUERIES + row * query_stride + begin + lane, mask=inside, other=0.0)
            at = KEYS + place[:, None] * key_stride + (begin + lane)[None, :]
            key = tl.load(at, mask=(slot < n)[:, None] & inside[None, :], other=0.0)
            total += tl.sum(key * query[None, :], 1)
        if BIASED:
            total += tl.load(BIAS + place, mask=slot < n, other=0.0)
        tl.store(VALUES + row * CAP + slot, total, mask=slot < n)


@triton.jit
def order_kernel(VALUES, PLACES, COUNTS, BEST, CAP: tl.constexpr):
    """Sort a row's list by latent and find its best; a list with a score that is not finite counts as incomplete."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(COUNTS + row)
    slot = tl.arange(0, CAP)
    z = tl.load(VALUES + row * CAP + slot, mask=slot < n, other=float("-inf"))
    place = tl.load(PLACES + row * CAP + slot, mask=slot < n, other=2147483647)
    low = z.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    key = tl.sort((place.to(tl.int64) << 32) | low, 0)
    z = key.to(tl.int32).to(tl.float32, bitcast=True)
    strange = tl.sum(((slot < n) & (finite(z) == 0)).to(tl.int32), 0)
    tl.debug_barrier()
    tl.store(VALUES + row * CAP + slot, z, mask=slot < n)
    tl.store(PLACES + row * CAP + slot, (key >> 32).to(tl.int32), mask=slot < n)
    tl.store(BEST + row, tl.where(n > 0, tl.max(z, 0), 0.0))
    if (strange > 0) & (n <= CAP):
        tl.store(COUNTS + row, CAP + 1)
