"""What every launch needs: tensors on one device, that device the current one, and launch shapes in one place.

Every launch shape is a reasoned default: none has been measured on a GPU yet. ``--device cuda`` of `recipes/benchmark`
measures.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from saehooks.errors import ConfigError

LEAST_CAPABILITY = (8, 0)
"""The oldest GPUs that the kernels are compiled for in the tests."""


def on(*tensors: Tensor) -> AbstractContextManager:
    """Make the tensors' device the current one; CPU tensors need Triton's interpreter.

    Raises:
        ConfigError: tensors on different devices, or on a device that has no kernels.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise ConfigError(
            f"the tensors of one operation live on {names}: move them to one device, codes.to(device) say"
        )
    device = devices.pop()
    if device.type == "cuda":
        return torch.cuda.device(device)
    if not triton.knobs.runtime.interpret:
        raise ConfigError(
            f"the gpu backend cannot run on {device.type} tensors; set TRITON_INTERPRET=1 before saehooks is imported "
            "to run its kernels in Triton's interpreter"
        )
    return nullcontext()


class SelectPlan(NamedTuple):
    """How the selection kernels are launched."""

    tile: int
    """Columns read at a time; also the number of groups, column mod tile, whose maxima bound the threshold."""
    gather: int
    """Columns of the groups above that bound read at a time."""
    cap: int
    """Candidates of a row kept aside; rows with more are read again."""
    stream: int
    """Columns read at a time in rows that are read again."""
    collect_warps: int
    finish_warps: int


def select_plan(d_sae: int, k: int = 0) -> SelectPlan:
    """Launch shape for rows of ``d_sae`` scores, of which top-k wants ``k``.

    Counted from compiled code for sm_90, not measured: at 8 scores a thread `collect` takes at most 64 registers, so
    1024 threads share a multiprocessor at tile 2048 and 4096 alike. Opened groups are read again in sectors of 32
    bytes, ``8 * support / tile`` of a row: at support 64 a quarter at tile 2048, an eighth at 4096. Short rows keep
    2048: four programs of 8 warps hide each other's sums (some 30 barriers a row) better than two of 16.
    """
    whole = power_of_two(d_sae)
    most = 4096 if d_sae > 16384 else 2048
    tile = min(whole, max(128, min(most, power_of_two(-(-d_sae // 4)))))
    cap = min(whole, max(1024, min(8192, power_of_two(2 * k))))
    warps = max(1, min(8, cap // 512))
    return SelectPlan(tile, max(1, tile // 4), cap, min(whole, 512 * warps), max(1, tile // 256), warps)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


class BatchPlan(NamedTuple):
    """How the kernels of batch top-k are launched."""

    select: SelectPlan
    fold: int
    """Group maxima that make one larger group when the bound is looked for."""
    share: int
    """Of these larger groups, how many a program counts."""
    block: int
    """Scores counted at a time."""
    warps: int


def batch_plan(d_sae: int, k: int) -> BatchPlan:
    """Launch shape for the ``k * rows`` largest scores of all rows of ``d_sae``.

    Counted, not measured: the maxima of 2048 groups are written once and read three times, a sixth of what 49,152
    scores take. Eight larger groups a match give a bound that 1.07 scores a match reach, for a quarter of the counting.
    """
    plan = select_plan(d_sae, 2 * k)  # rows may take many more than k
    tile = min(plan.tile, 2048)
    plan = plan._replace(tile=tile, gather=max(1, tile // 4), collect_warps=max(1, tile // 256))
    return BatchPlan(plan, max(1, min(16, tile // power_of_two(8 * k))), share=4096, block=512, warps=2)


class ProductPlan(NamedTuple):
    """How the sparse products are launched."""

    width: int
    """Columns of a table that a program handles at a time."""
    blocks: int
    """Programs beside each other that cover the width."""
    entries: int
    """Entries of a row handled at a time."""
    column_entries: int
    """Entries of a column handled at a time: columns are short."""
    warps: int


def product_plan(width: int) -> ProductPlan:
    """Launch shape for tables of rows of ``width``."""
    block = min(256, max(16, power_of_two(width)))
    return ProductPlan(block, -(-width // block), 16, 8, 4)


class GemmPlan(NamedTuple):
    """How the product that keeps only candidates is launched."""

    step: int
    """Every step-th latent is scored first, for the bounds."""
    rows: int
    latents: int
    depth: int
    band: int
    """Row tiles that share a pass over the keys."""
    warps: int
    stages: int
    cap: int
    """Candidates of a row that are listed; more, and the scores have to be written after all."""


GEMM_PLAN = GemmPlan(step=8, rows=128, latents=128, depth=64, band=8, warps=8, stages=3, cap=512)
"""128 x 256 tiles spill registers."""


SCORE_BYTES = 2**30
"""Most memory the scores of a chunk of rows take."""

UNWRITTEN_FROM: int | None = None
"""Scores (rows x d_sae) from which on they are not written but scored and filtered in one kernel. None: always
written, by the vendor's product, which is the safe form; set it where a measurement says so."""


def writes_scores(rows: int, d_sae: int, k: int) -> bool:
    """Whether the scores of a batch are written to memory before selection (for top-k, of how many)."""
    return UNWRITTEN_FROM is None or rows * d_sae < UNWRITTEN_FROM or 4 * k > GEMM_PLAN.cap


SCREENED_FROM: int | None = None
"""Float32 scores (rows x d_sae) from which on candidates are found by a bfloat16 product and they alone are scored in
float32. None: never, until a measurement (`encode.py --device cuda`, "sparsemax, screened") says where it is faster."""


def screens(rows: int, d_sae: int, k: int) -> bool:
    """Whether float32 queries are screened in bfloat16 (for top-k, of how many)."""
    return SCREENED_FROM is not None and rows * d_sae >= SCREENED_FROM and 4 * k <= GEMM_PLAN.cap


def score_rows(rows: int, d_sae: int) -> int:
    """Rows scored at a time."""
    return max(1, min(rows, SCORE_BYTES // (4 * d_sae)))
