"""Sums over the ranks that split a dictionary, with their gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from saehooks.kernels import Support
from saehooks.ranks.grid import Alone, Ranks

NEWTON_STEPS = 64
"""More than any threshold needs: each step takes at least one score out of the support."""
WIDE = torch.finfo(torch.float64)


def sum_of_parts(part: Tensor, ranks: Ranks) -> Tensor:
    """The sum over ranks of what each has of its own latents; every part has the gradient of the sum."""
    return part if ranks.latents == 1 else _SumOfParts.apply(part, ranks)


def sum_of_gradients(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The same tensor on every rank, whose gradient is the sum of what each rank's latents say of it."""
    return tensor if ranks.latents == 1 else _SumOfGradients.apply(tensor, ranks)


def mean_of_all(part: Tensor, ranks: Alone) -> Tensor:
    """The sum over latents, and mean over rows, of a number that each rank has of its own."""
    return _MeanOfAll.apply(part, ranks) if isinstance(ranks, Ranks) and ranks.size > 1 else part


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        return ranks.over_latents(part.clone(memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.over_latents(grad.clone(memory_format=torch.contiguous_format)), None


class _MeanOfAll(torch.autograd.Function):
    """Gradients of ranks that split the rows are averaged later: each part has the gradient of the whole."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        return ranks.over_all(part.clone()) / ranks.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def newton_threshold(scores: Tensor, rows: Tensor, below: Tensor, alpha: float, ranks: Ranks) -> Tensor:
    """(rows,) float64, the score above which alpha-entmax over the latents of all ranks is positive.

    A part's own threshold lies below that of the whole, and from below Newton's rule never steps over it: two sums of
    each row and step are exchanged.

    Args:
        scores: (nnz,) of own latents, all that can be above it.
        rows: (nnz,) of each.
        below: (rows,) a lower bound, such as the threshold of own latents alone.
        alpha: 2 is sparsemax.
        ranks: that share the rows.
    Source: Peters et al. 2019, arXiv:1905.05702.
    """
    power, wide = 1 / (alpha - 1), scores.double()
    tau = ranks.over_latents(below.double().clone(), dist.ReduceOp.MAX)
    for _ in range(NEWTON_STEPS):
        ranks.newton_steps += 1
        above = ((alpha - 1) * (wide - tau[rows])).clamp(min=0)
        slope = torch.where(above > 0, above.pow(power - 1), 0.0)
        sums = torch.zeros(len(tau), 2, dtype=torch.float64, device=tau.device)
        sums.index_add_(0, rows, torch.stack([slope * above, slope], dim=1))
        total, steep = ranks.over_latents(sums).unbind(1)
        step = ((total - 1) / steep.clamp(min=WIDE.tiny)).clamp(min=0)
        tau = tau + step
        if not bool((step > 1e-14 * (1 + tau.abs())).any()):
            break
    return tau


def largest_of_rows(
    scores: Tensor, support: Support, k: int, most: int, ranks: Ranks, lowest: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Of each row, the k largest scores of the latents of all ranks; of equal ones the first latents.

    Args:
        scores: (nnz,) of own latents.
        support: theirs.
        k: how many are kept.
        most: entries that a rank may have in a row.
        ranks: that share the rows.
        lowest: only scores above it are kept.
    Returns:
        (rows,) the smallest that is kept, at least ``lowest``, and (nnz,) bool, which own entries are kept.
    """
    rows = support.rows
    places = torch.arange(len(scores), device=scores.device) - support.offsets[rows]
    table = scores.new_full((support.n_rows, most), -torch.inf)
    table[rows, places] = scores
    tables = torch.stack(ranks.gathered_latents(table))  # (ranks, rows, most)
    joined = tables.transpose(0, 1).flatten(1)
    smallest = joined.topk(k, dim=1).values[:, -1].clamp(min=lowest)
    room = k - (joined > smallest[:, None]).sum(1)
    equal = (tables == smallest[:, None]) & (tables > lowest)
    room = room - equal[: ranks.latent_rank].sum((0, 2))
    tied = (scores == smallest[rows]) & (scores > lowest)
    so_far = tied.long().cumsum(0)
    before = torch.cat([so_far.new_zeros(1), so_far])[support.offsets[:-1]]
    return smallest, (scores > smallest[rows]) | (tied & (so_far - before[rows] <= room[rows]))


def simplex_weights(scores: Tensor, rows: Tensor, n_rows: int, ranks: Ranks) -> Tensor:
    """(nnz,) sparsemax weights of the latents of all ranks: `saehooks.kernels.simplex_weights` over ranks."""
    return _Centered.apply(scores, rows, n_rows, 1.0, ranks)


class _Centered(torch.autograd.Function):
    """A shift of each row to a given sum. Its gradient is the shift to the sum 0."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, n_rows: int, total: float, ranks: Ranks) -> Tensor:
        ctx.rows, ctx.n_rows, ctx.ranks = rows, n_rows, ranks
        return _centered(values, rows, n_rows, total, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _centered(grad, ctx.rows, ctx.n_rows, 0.0, ctx.ranks), None, None, None, None


def _centered(values: Tensor, rows: Tensor, n_rows: int, total: float, ranks: Ranks) -> Tensor:
    wide = values.double()
    sums = wide.new_zeros(n_rows, 2).index_add_(0, rows, torch.stack([wide, torch.ones_like(wide)], dim=1))
    found, count = ranks.over_latents(sums).unbind(1)
    shift = (found - total) / count.clamp(min=1)
    return (wide - shift[rows]).to(values.dtype)


def entmax_weights(scores: Tensor, support: Any, alpha: Tensor, ranks: Ranks) -> Tensor:
    """(nnz,) entmax probabilities of the latents of all ranks: `saehooks.kernels.entmax_weights` over ranks."""
    return _EntmaxWeights.apply(scores, alpha, support, ranks)


class _EntmaxWeights(torch.autograd.Function):
    """The formulas of `saehooks.kernels.reference.weights`, with sums over all latents of a row."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: Tensor, support: Any, ranks: Ranks) -> Tensor:
        rows, number = support.rows, float(alpha)
        # The threshold was rounded to the dtype of the scores: a little below it Newton's rule finds the exact one.
        below = support.threshold.double()
        below = below - 4 * torch.finfo(torch.float32).eps * (1 + below.abs())
        tau = newton_threshold(scores, rows, below, number, ranks)
        weights = ((number - 1) * (scores.double() - tau[rows])).clamp(min=0).pow(1 / (number - 1))
        ctx.save_for_backward(weights, rows, alpha)
        ctx.n_rows, ctx.ranks = support.n_rows, ranks
        return weights.to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weights, rows, alpha), wide, ranks = ctx.saved_tensors, grad.double(), ctx.ranks
        exponent, positive = float(alpha), weights > 0
        floor = weights.clamp(min=1e-300)
        slope = torch.where(positive, floor.pow(2 - exponent), 0.0)
        surprise = torch.where(positive, weights * floor.log(), 0.0)
        parts = torch.stack([slope, slope * wide, surprise], dim=1)
        sums = ranks.over_latents(wide.new_zeros(ctx.n_rows, 3).index_add_(0, rows, parts))
        steep, pulled, surprised = sums[rows].unbind(1)
        skewed = slope / steep.clamp(min=WIDE.tiny)
        d_scores, d_alpha = (slope * wide - skewed * pulled).to(grad.dtype), None
        if ctx.needs_input_grad[1]:
            change = (weights - skewed) / (exponent - 1) ** 2
            each = wide * (change - (surprise - skewed * surprised) / (exponent - 1))
            d_alpha = ranks.over_latents(each.sum()).to(alpha.dtype)
        return d_scores, d_alpha, None, None
