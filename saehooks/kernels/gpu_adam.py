"""Host side of the fused update: sparse sums of a table's gradient straight into Adam."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from saehooks.kernels import triton_adam
from saehooks.kernels.deferred import Contribution
from saehooks.kernels.gpu_launch import on
from saehooks.kernels.gpu_plan import product_plan
from saehooks.kernels.gpu_products import SEGMENT, arguments, column_sum


class AdamNumbers(NamedTuple):
    """Adam's settings in one step."""

    lr: Tensor
    """() float32 on the device."""
    corrections: Tensor
    """(2,) float32 on the device: ``1 - beta ** steps`` for both betas."""
    skip: Tensor
    """() float32 on the device: where it is not 0, nothing changes."""
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def update(
    table: Tensor, mean: Tensor, square: Tensor, gradient: list[Contribution] | Tensor, numbers: AdamNumbers
) -> None:
    """One step of Adam on a contiguous table (d_sae, d), in place.

    Args:
        table, mean, square: the parameter and its two running means.
        gradient: one or two sparse sums, or a contiguous tensor like the table.
        numbers: settings.
    """
    sums = [] if isinstance(gradient, Tensor) else gradient
    with on(table, mean, square, numbers.lr, numbers.skip):
        parts = [column_sum(one.values, one.indices, one.offsets, one.left, table.shape[0]) for one in sums]
        plan = product_plan(table.shape[1])
        nothing: tuple[Any, ...] = (table,) * 7 + (0,)
        first = arguments(parts[0]) if parts else nothing
        second = arguments(parts[1]) if len(parts) > 1 else nothing
        triton_adam.step[(table.shape[0], plan.blocks)](
            *first, *second, gradient if isinstance(gradient, Tensor) else table, table, mean, square,
            numbers.corrections, numbers.lr, numbers.skip,
            numbers.beta1, numbers.beta2, numbers.eps, numbers.weight_decay, table.shape[1],
            SPARSE=bool(parts), TWO=len(parts) > 1, SEGMENT=SEGMENT,
            WIDTH=plan.width, ENTRIES=plan.column_entries, num_warps=plan.warps,
        )  # fmt: skip


def numbers(group: dict[str, Any], steps: Tensor, skip: Tensor | None) -> AdamNumbers:
    """Settings of a parameter group for the step that ``steps``, () float32, counts; nothing waits for the device."""
    device, (beta1, beta2) = steps.device, group["betas"]
    powers = torch.stack(
        [torch.full_like(steps, beta, dtype=torch.float64) ** steps.double() for beta in (beta1, beta2)]
    )
    lr = group["lr"] if isinstance(group["lr"], Tensor) else torch.full((), group["lr"], device=device)
    skip = torch.zeros((), device=device) if skip is None else skip.float()
    return AdamNumbers(
        lr.to(device, torch.float32), (1 - powers).float(), skip, beta1, beta2, group["eps"], group["weight_decay"]
    )
