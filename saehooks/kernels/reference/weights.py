"""Weights on the simplex over given supports, in plain torch: any device, any dtype, sums in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from saehooks.precision import widened
from saehooks.support import rows_of


def center(values: Tensor, offsets: Tensor, total: float) -> Tensor:
    """(nnz,) values shifted by a constant in each row, so that the row sums to ``total``."""
    rows = rows_of(offsets, values.numel())
    sizes, wide = widened(offsets.diff().clamp(min=1)), widened(values)
    shift = wide.new_zeros(sizes.numel()).index_add(0, rows, wide) / sizes
    centered = wide - shift[rows]
    tau = (wide.new_zeros(sizes.numel()).index_add(0, rows, centered) - total) / sizes
    return (centered - tau[rows]).to(values.dtype)


def simplex_thresholds(scores: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """(rows,) float64 tau of sparsemax over ``scale * scores`` (nnz,) of each row: ``max(score - tau, 0)`` sums to 1.

    Infinite and NaN scores leave their row without one: -inf. So does a row of no scores.

    Source: Michelot 1986: all entries at first; those below the threshold of what is left leave, until none does.
    """
    rows, wide = rows_of(offsets, scores.numel()), widened(scores) * scale
    n_rows, inside = offsets.numel() - 1, torch.ones_like(wide, dtype=torch.bool)
    while True:
        count = wide.new_zeros(n_rows).index_add_(0, rows, inside.to(wide.dtype))
        total = wide.new_zeros(n_rows).index_add_(0, rows, torch.where(inside, wide, 0.0))
        tau = (total - 1) / count.clamp(min=1)
        left = inside & ~(wide <= tau[rows])
        if bool((left == inside).all()):
            return torch.where(tau.isfinite() & (count > 0), tau, -torch.inf)
        inside = left


def entmax_weights(scores: Tensor, offsets: Tensor, alpha: Tensor) -> Tensor:
    """(nnz,) float64 entmax probabilities of compressed rows of scores (nnz,), alpha () on their device."""
    rows, n_rows, power = rows_of(offsets, scores.numel()), offsets.numel() - 1, 1 / (float(alpha) - 1)
    wide = widened(scores)
    best = wide.new_full((n_rows,), -torch.inf).scatter_reduce(0, rows, wide, "amax")
    scaled = (wide - best[rows]) / power
    tau = wide.new_full((n_rows,), -1.0)
    for _ in range(100):
        above = (scaled - tau[rows]).clamp(min=0)
        slope = torch.where(above > 0, above.pow(power - 1), 0.0)  # 0 ** 0 is 1
        mass = torch.zeros_like(tau).index_add_(0, rows, slope * above)
        ahead = ((mass - 1) / (power * torch.zeros_like(tau).index_add_(0, rows, slope))).clamp(min=0)
        tau = tau + ahead
        if not (ahead > 1e-15).any():
            break
    return (scaled - tau[rows]).clamp(min=0).pow(power)


def entmax_gradient(
    weights: Tensor, grad: Tensor, offsets: Tensor, alpha: Tensor, learned: bool
) -> tuple[Tensor, Tensor]:
    """(nnz,) gradient of the scores, in the dtype of ``grad``, and () float64 of alpha, 0 unless it is learned."""
    rows, n_rows = rows_of(offsets, weights.numel()), offsets.numel() - 1
    exponent, wide = float(alpha), widened(grad)

    def row_sum(entries: Tensor) -> Tensor:
        return entries.new_zeros(n_rows).index_add_(0, rows, entries)[rows]

    positive = weights > 0
    slope = torch.where(positive, weights.clamp(min=1e-300).pow(2 - exponent), 0.0)
    skewed = slope / row_sum(slope)
    d_scores = slope * wide - skewed * row_sum(slope * wide)
    d_alpha = wide.new_zeros(())
    if learned:
        surprise = torch.where(positive, weights * weights.clamp(min=1e-300).log(), 0.0)
        change = (weights - skewed) / (exponent - 1) ** 2
        d_alpha = (wide * (change - (surprise - skewed * row_sum(surprise)) / (exponent - 1))).sum()
    return d_scores.to(grad.dtype), d_alpha
