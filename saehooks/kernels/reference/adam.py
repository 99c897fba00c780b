"""Adam for a table whose gradient is kept as sparse sums, in plain torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from saehooks.kernels.reference.products import spmm_transposed
from saehooks.kernels.step import Contribution
from saehooks.precision import widened, widest


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

    @classmethod
    def of(cls, group: dict[str, Any], steps: Tensor, skip: Tensor | None) -> AdamNumbers:
        """Those of a parameter group for the step that ``steps``, () float32, counts; nothing waits for the device."""
        device, (beta1, beta2) = steps.device, group["betas"]
        powers = torch.stack(
            [torch.full_like(steps, beta, dtype=widest(device)) ** widened(steps) for beta in (beta1, beta2)]
        )
        lr = group["lr"]
        lr = lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float32, device=device)
        skip = torch.zeros((), dtype=torch.float32, device=device) if skip is None else skip.float()
        return cls(
            lr.to(device, torch.float32), (1 - powers).float(), skip, beta1, beta2, group["eps"], group["weight_decay"]
        )


def adam_step(
    table: Tensor, mean: Tensor, square: Tensor, gradient: list[Contribution] | Tensor, numbers: AdamNumbers
) -> None:
    """One step of Adam on a table (d_sae, d), in place, its gradient given as sparse sums or written.

    Args:
        table, mean, square: the parameter and its two running means.
        gradient: sparse sums, or a tensor like the table.
        numbers: settings.
    Source: Kingma & Ba 2015, arXiv:1412.6980, Alg. 1, as ``torch.optim.Adam`` computes it.
    """
    if isinstance(gradient, Tensor):
        grad = gradient.to(table.dtype)
    else:
        grad = torch.zeros_like(table)
        for one in gradient:
            grad += spmm_transposed(one.values, one.support, one.left, table.shape[0])
    if bool(numbers.skip):
        return
    grad = grad + numbers.weight_decay * table
    mean.lerp_(grad.to(mean.dtype), 1 - numbers.beta1)
    square.mul_(numbers.beta2).addcmul_(grad, grad, value=1 - numbers.beta2)
    size = (square / numbers.corrections[1]).sqrt() + numbers.eps
    table.sub_(numbers.lr / numbers.corrections[0] * mean / size)
