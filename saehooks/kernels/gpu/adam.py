"""Adam for a table, fused with the sparse sums that make its gradient: the gradient never reaches memory."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from saehooks.kernels.gpu.launch import on, product_plan
from saehooks.kernels.gpu.products import SEGMENT, arguments, column_sum, sum_of_column
from saehooks.kernels.reference.adam import AdamNumbers
from saehooks.kernels.step import Contribution


def adam_step(
    table: Tensor, mean: Tensor, square: Tensor, gradient: list[Contribution] | Tensor, numbers: AdamNumbers
) -> None:
    """One step of Adam on a contiguous table (d_sae, d), in place, its gradient given as sparse sums or written.

    Args:
        table, mean, square: the parameter and its two running means.
        gradient: one or two sparse sums, or a contiguous tensor like the table.
        numbers: settings.
    """
    sums = [] if isinstance(gradient, Tensor) else gradient
    with on(table, mean, square, numbers.lr, numbers.skip):
        parts = [column_sum(one.values, one.support, one.left, table.shape[0]) for one in sums]
        plan = product_plan(table.shape[1])
        nothing: tuple[Any, ...] = (table,) * 7 + (0,)
        first = arguments(parts[0]) if parts else nothing
        second = arguments(parts[1]) if len(parts) > 1 else nothing
        step_kernel[(table.shape[0], plan.blocks)](
            *first, *second, gradient if isinstance(gradient, Tensor) else table, table, mean, square,
            numbers.corrections, numbers.lr, numbers.skip,
            numbers.beta1, numbers.beta2, numbers.eps, numbers.weight_decay, table.shape[1],
            SPARSE=bool(parts), TWO=len(parts) > 1, SEGMENT=SEGMENT,
            WIDTH=plan.width, ENTRIES=plan.column_entries, num_warps=plan.warps,
        )  # fmt: skip


# ---------------------------------------------------------------- Triton kernels


@triton.jit
def step_kernel(
    VALUES_A, PLACES_A, ROWS_A, STARTS_A, EXTRAS_A, PARTS_A, LEFT_A, left_stride_a,
    VALUES_B, PLACES_B, ROWS_B, STARTS_B, EXTRAS_B, PARTS_B, LEFT_B, left_stride_b,
    GRAD, TABLE, MEAN, SQUARE, CORRECTIONS, LR, SKIP, beta1, beta2, eps, weight_decay, width,
    SPARSE: tl.constexpr, TWO: tl.constexpr,
    SEGMENT: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One block of one row of a table: its gradient from one or two sparse sums or from memory, then Adam's update.

    CORRECTIONS holds ``1 - beta1 ** steps`` and ``1 - beta2 ** steps``; where SKIP is not 0 nothing is changed.
    Source: Kingma & Ba 2015, arXiv:1412.6980, Alg. 1, as ``torch.optim.Adam`` computes it.
    """
    column = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = lane < width
    at = column * width + lane
    if tl.load(SKIP) == 0.0:
        if SPARSE:
            grad = sum_of_column(
                VALUES_A, PLACES_A, ROWS_A, STARTS_A, EXTRAS_A, PARTS_A, LEFT_A, left_stride_a, column, lane, width,
                SEGMENT, ENTRIES,
            )  # fmt: skip
            if TWO:
                grad += sum_of_column(
                    VALUES_B, PLACES_B, ROWS_B, STARTS_B, EXTRAS_B, PARTS_B, LEFT_B, left_stride_b, column, lane,
                    width, SEGMENT, ENTRIES,
                )  # fmt: skip
        else:
            grad = tl.load(GRAD + at, mask=inside, other=0.0).to(tl.float32)
        table = tl.load(TABLE + at, mask=inside, other=0.0).to(tl.float32)
        grad += weight_decay * table
        mean = tl.load(MEAN + at, mask=inside, other=0.0).to(tl.float32)
        square = tl.load(SQUARE + at, mask=inside, other=0.0).to(tl.float32)
        mean += (1.0 - beta1) * (grad - mean)
        square = beta2 * square + (1.0 - beta2) * grad * grad
        size = tl.sqrt(square / tl.load(CORRECTIONS + 1)) + eps
        table -= tl.load(LR) / tl.load(CORRECTIONS) * mean / size
        tl.store(TABLE + at, table.to(TABLE.dtype.element_ty), mask=inside)
        tl.store(MEAN + at, mean.to(MEAN.dtype.element_ty), mask=inside)
        tl.store(SQUARE + at, square.to(SQUARE.dtype.element_ty), mask=inside)
