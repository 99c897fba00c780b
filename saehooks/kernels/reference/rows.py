"""What is computed row by row around the products: directions and norms, gradients of a scale, squared errors."""

from __future__ import annotations

import torch
from torch import Tensor


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """(rows,) sums of ``left * right`` of each row of two (rows, d)."""
    if left.device.type == "cpu" and left.dtype.itemsize >= 4:
        return torch.linalg.vecdot(left, right)
    # Narrow products are rounded to their own type only once they are summed.
    return torch.bmm(left[:, None, :], right[:, :, None])[:, 0, 0]


def directions(x: Tensor, offset: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(rows, d) ``c / (|c| + eps)`` and (rows,) ``|c|`` of ``c = x - offset``; x (rows, d), offset (d,)."""
    centred = x if offset is None else x - offset
    norm = torch.linalg.vector_norm(centred, dim=1)
    return centred / (norm + eps)[:, None], norm


def scaled_gradient(grad: Tensor, recons: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (rows, d) and (rows,) of recons and scale in ``recons * scale[:, None]``, from its own (rows, d)."""
    return grad * scale[:, None], row_products(grad, recons)


def squared_errors(left: Tensor, right: Tensor) -> Tensor:
    """(rows,) ``|left - right|^2`` of each row of left (rows, d) and right (rows, d), or (1, d) for all."""
    return (left - right).square().sum(1)


def scaled_difference(left: Tensor, right: Tensor, factor: Tensor) -> Tensor:
    """(rows, d) ``factor[:, None] * (left - right)`` of two (rows, d), factor (rows,)."""
    return factor[:, None] * (left - right)
