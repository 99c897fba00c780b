"""Adam for a table, fused with the sparse sums that make its gradient: the gradient never reaches memory."""

from __future__ import annotations

import triton
import triton.language as tl

from saehooks.kernels.triton_products import column_sum


@triton.jit
def step(
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
            grad = column_sum(
                VALUES_A, PLACES_A, ROWS_A, STARTS_A, EXTRAS_A, PARTS_A, LEFT_A, left_stride_a, column, lane, width,
                SEGMENT, ENTRIES,
            )  # fmt: skip
            if TWO:
                grad += column_sum(
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
