"""Rows of float32 on CPU, each computed in one pass: over few latents, passes through memory are most of a step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from saehooks.kernels.cpu.numba_jit import numba_jit
from saehooks.kernels.cpu.products import serves
from saehooks.kernels.cpu.threads import GRAIN, blocks, spread
from saehooks.kernels.memory import reusable_empty
from saehooks.kernels.reference import rows as reference


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """(rows,) sums of ``left * right`` of each row of two (rows, d)."""
    if not _fit(left, right):
        return reference.row_products(left, right)
    out = left.new_empty(len(left))
    _each(_product_range, left, right, out)
    return out


def directions(x: Tensor, offset: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(rows, d) ``c / (|c| + eps)`` and (rows,) ``|c|`` of ``c = x - offset``; x (rows, d), offset (d,)."""
    if not (_fit(x) and (offset is None or serves(offset))):
        return reference.directions(x, offset, eps)
    out, norm = reusable_empty(*x.shape), x.new_empty(len(x))
    _each(_direction_range, x, x.new_empty(0) if offset is None else offset, out, norm, np.float32(eps))
    return out, norm


def scaled_gradient(grad: Tensor, recons: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (rows, d) and (rows,) of recons and scale in ``recons * scale[:, None]``, from its own (rows, d)."""
    if not (_fit(grad, recons) and serves(scale)):
        return reference.scaled_gradient(grad, recons, scale)
    d_recons, d_scale = reusable_empty(*grad.shape), grad.new_empty(len(grad))
    _each(_gradient_range, grad, recons, scale, d_recons, d_scale)
    return d_recons, d_scale


def squared_errors(left: Tensor, right: Tensor) -> Tensor:
    """(rows,) ``|left - right|^2`` of each row of left (rows, d) and right (rows, d), or (1, d) for all."""
    if not (_fit(left) and serves(right) and right.shape in (left.shape, (1, left.shape[1]))):
        return reference.squared_errors(left, right)
    out = left.new_empty(len(left))
    _each(_error_range, left, right, out)
    return out


def scaled_difference(left: Tensor, right: Tensor, factor: Tensor) -> Tensor:
    """(rows, d) ``factor[:, None] * (left - right)`` of two (rows, d), factor (rows,)."""
    if not (_fit(left, right) and serves(factor)):
        return reference.scaled_difference(left, right, factor)
    out = reusable_empty(*left.shape)
    _each(_difference_range, left, right, factor, out)
    return out


def _fit(*tensors: Tensor) -> bool:
    """Whether the loops take these: matrices of one shape, not empty."""
    first = tensors[0]
    return first.dim() == 2 and first.numel() > 0 and all(serves(one) and one.shape == first.shape for one in tensors)


def _each(loop: Callable[..., None], matrix: Tensor, *more: Tensor | np.float32) -> None:
    """``loop(start, stop, ...)`` for blocks of the rows of a matrix, on all threads; tensors are given as arrays."""
    rows, d = matrix.shape
    given = [one.detach().contiguous().numpy() if isinstance(one, Tensor) else one for one in (matrix, *more)]
    spread(lambda start, stop: loop(start, stop, *given), blocks(rows, max(1, GRAIN // d)))


# ----------------------------------------------------------------------- loops


@numba_jit
def _product_range(start, stop, left, right, out):
    for r in range(start, stop):
        x, y = left[r], right[r]
        total = np.float32(0.0)
        for j in range(x.size):
            total += x[j] * y[j]
        out[r] = total


@numba_jit
def _direction_range(start, stop, x, offset, out, norms, eps):
    for r in range(start, stop):
        row, to = x[r], out[r]
        total = np.float32(0.0)
        if offset.size:
            for j in range(row.size):
                to[j] = row[j] - offset[j]
                total += to[j] * to[j]
        else:
            for j in range(row.size):
                to[j] = row[j]
                total += to[j] * to[j]
        norm = np.sqrt(total)
        norms[r] = norm
        by = norm + eps
        for j in range(row.size):
            to[j] /= by


@numba_jit
def _gradient_range(start, stop, grad, recons, scale, d_recons, d_scale):
    for r in range(start, stop):
        g, x, to = grad[r], recons[r], d_recons[r]
        by, total = scale[r], np.float32(0.0)
        for j in range(g.size):
            total += g[j] * x[j]
            to[j] = g[j] * by
        d_scale[r] = total


@numba_jit
def _error_range(start, stop, left, right, out):
    for r in range(start, stop):
        x, y = left[r], right[min(r, len(right) - 1)]
        total = np.float32(0.0)
        for j in range(x.size):
            apart = x[j] - y[j]
            total += apart * apart
        out[r] = total


@numba_jit
def _difference_range(start, stop, left, right, factor, out):
    for r in range(start, stop):
        x, y, to = left[r], right[r], out[r]
        by = factor[r]
        for j in range(x.size):
            to[j] = by * (x[j] - y[j])
