"""The two differentiable sparse products, each the other's gradient, on whichever path serves the tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saehooks.kernels.deferred import take
from saehooks.kernels.dispatch import path


def sddmm(
    left: Tensor,
    table: Tensor,
    indices: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Differentiable sampled product: ``left[row] . table[index] + bias[index]`` for every selected entry.

    Args:
        left: (rows, d).
        table: (d_sae, d), one row a latent.
        indices, offsets: compressed rows, (nnz,) and (rows + 1,).
        bias: (d_sae,), or None for none.
        known: (nnz,) the result, where selection had it at hand; only the gradient is computed then.
    Returns:
        (nnz,) products, in the order of ``indices``.
    """
    return _Sddmm.apply(left, table, bias, indices, offsets, known)


def spmm(values: Tensor, indices: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """Differentiable sparse product: row ``r`` of the result is the sum of ``value * table[index]`` over its entries.

    Args:
        values: (nnz,).
        indices, offsets: compressed rows, (nnz,) and (rows + 1,).
        table: (d_sae, d), one row a latent.
    Returns:
        (rows, d).
    """
    return _Spmm.apply(values, indices, offsets, table)


class _Sddmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, left, table, bias, indices, offsets, known):
        ctx.save_for_backward(left, table, indices, offsets)
        if known is not None:
            return known.detach().to(left.dtype, copy=True)
        found = path(left).sddmm(left, table, indices, offsets)
        return found if bias is None else found + bias[indices]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        left, table, indices, offsets = ctx.saved_tensors
        kernels = path(left)
        d_left = d_table = d_bias = None
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            d_left = kernels.spmm(grad, indices, offsets, table)
        if ctx.needs_input_grad[1] and not take(table, grad, indices, offsets, left):
            d_table = kernels.spmm_transposed(grad, indices, offsets, left, table.shape[0])
        if ctx.needs_input_grad[2]:
            d_bias = _sum_by_latent(grad, indices, offsets, table.shape[0])
        return d_left, d_table, d_bias, None, None, None


def _sum_by_latent(values: Tensor, indices: Tensor, offsets: Tensor, d_sae: int) -> Tensor:
    if values.device.type == "cpu":
        return values.new_zeros(d_sae).index_add_(0, indices, values)
    # index_add_ on a GPU adds in any order; the column-sorted product has one order.
    ones = values.new_ones(offsets.numel() - 1, 1)
    return path(values).spmm_transposed(values, indices, offsets, ones, d_sae)[:, 0]


class _Spmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, offsets, table):
        ctx.save_for_backward(values, indices, offsets, table)
        return path(table).spmm(values, indices, offsets, table)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        values, indices, offsets, table = ctx.saved_tensors
        kernels = path(table)
        d_values = d_table = None
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            d_values = kernels.sddmm(grad, table, indices, offsets).to(values.dtype)
        if ctx.needs_input_grad[3] and not take(table, values, indices, offsets, grad):
            d_table = kernels.spmm_transposed(values, indices, offsets, grad, table.shape[0])
        return d_values, None, None, d_table
