"""Host side of the entmax probabilities of given supports on the GPU: one order of every sum, no waiting."""

from __future__ import annotations

import torch
from torch import Tensor

from saehooks.kernels import triton_entmax as kernels
from saehooks.kernels.gpu_launch import on

ENTRIES = 128
"""Entries of a row handled at a time, by one warp."""


def entmax_weights(scores: Tensor, offsets: Tensor, alpha: Tensor) -> Tensor:
    """(nnz,) float64 probabilities of compressed rows of scores, alpha a scalar on their device; 0 for padding."""
    scores = scores.contiguous()
    out = torch.zeros_like(scores, dtype=torch.float64)
    with on(scores, offsets, alpha):
        if out.numel() and offsets.numel() > 1:
            kernels.weights[(offsets.numel() - 1,)](scores, offsets, alpha, out, ENTRIES=ENTRIES, num_warps=1)
    return out


def entmax_gradient(
    weights: Tensor, grad: Tensor, offsets: Tensor, alpha: Tensor, learned: bool
) -> tuple[Tensor, Tensor]:
    """(nnz,) gradient of the scores, in the dtype of ``grad``, and () float64 of alpha, 0 unless it is learned."""
    grad = grad.contiguous()
    out = torch.zeros_like(grad)
    shares = weights.new_zeros(offsets.numel() - 1)
    with on(weights, grad, offsets, alpha):
        if out.numel() and shares.numel():
            kernels.gradient[(shares.numel(),)](
                weights, grad, offsets, alpha, out, shares, LEARNED=learned, ENTRIES=ENTRIES, num_warps=1
            )
    return out, shares.sum()
