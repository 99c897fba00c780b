"""The Zipf curve of feature densities, and sharing a budget of matches along it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saehooks.errors import ConfigError
from saehooks.precision import in_float64, widened


class Zipf(NamedTuple):
    """Density expected at a rank: ``scale / (rank + shift)^exponent``, ranks from 1. Source: arXiv:2411.02124."""

    scale: float
    shift: float
    exponent: float

    def at(self, ranks: Tensor) -> Tensor:
        """Density expected at each rank; ``ranks`` and the result are (n,)."""
        return self.scale / (widened(ranks) + self.shift) ** self.exponent


def ranks(density: Tensor) -> Tensor:
    """(d_sae,) int64 rank of each latent, 1 for the densest; equal densities in the order of the latents."""
    order = density.argsort(descending=True, stable=True)
    return torch.empty_like(order).index_put((order,), torch.arange(1, order.numel() + 1, device=order.device))


def fit_zipf(density: Tensor, head: float = 1.0, points: int = 256) -> Zipf:
    """Fit the curve to densities by least squares of their logarithms, at ranks spread evenly in log rank.

    Dead latents take no part. The shift is searched on a grid, the other two solved for. Our reading: the paper's
    procedure was not at hand.

    Args:
        density: (d_sae,) share of rows in which each latent fired.
        head: share of the ranks, from the densest, that the curve is fitted to.
        points: ranks looked at.

    >>> curve = fit_zipf(0.5 / torch.arange(1, 200).double() ** 1.2)
    >>> round(curve.scale, 2), round(curve.exponent, 2)
    (0.5, 1.2)
    """
    alive = in_float64(density).sort(descending=True).values[: max(3, round(head * density.numel()))]
    alive = alive[alive > 0]
    n = alive.numel()
    if n < 3:
        return Zipf(float(alive.max()) if n else 0.0, 0.0, 1.0)
    spread = torch.logspace(0, torch.tensor(float(n)).log10().item(), points, dtype=torch.float64, device=alive.device)
    rank = spread.round().clamp(1, n).unique()
    target = alive[rank.long() - 1].log()
    shifts = torch.cat([alive.new_zeros(1), torch.logspace(-1, 4, 101, dtype=torch.float64, device=alive.device)])
    x = (rank + shifts[:, None]).log()
    x_mean, y_mean = x.mean(1, keepdim=True), target.mean()
    slope = ((x - x_mean) * (target - y_mean)).sum(1) / (x - x_mean).square().sum(1)
    level = y_mean - slope * x_mean[:, 0]
    error = (level[:, None] + slope[:, None] * x - target).square().sum(1)
    best = int(error.argmin())
    return Zipf(float(level[best].exp()), float(shifts[best]), float(-slope[best]))


def apportion(weights: Tensor, total: int, cap: int, first: Tensor | None = None) -> Tensor:
    """Share ``total`` whole matches in proportion to weights, none above ``cap``; they add up exactly.

    Args:
        weights: (n,) not negative, not all zero.
        total: to be shared; at most n * cap.
        cap: the most for one.
        first: (n,) int64 order in which equal claims to a last match are served; the given order if None.
    Returns:
        (n,) int64 with sum ``total``.
    Raises:
        ConfigError: more than ``n * cap`` matches to share.

    >>> apportion(torch.tensor([6.0, 3.0, 1.0]), total=10, cap=5)
    tensor([5, 4, 1])
    """
    n = weights.numel()
    if total > n * cap:
        raise ConfigError(f"a budget of {total} matches is larger than the batch: {n} latents x {cap} rows")
    device, weights = weights.device, in_float64(weights).clamp(min=1e-300)
    full = torch.zeros(n, dtype=torch.bool, device=weights.device)
    while True:
        open_weight = weights.masked_fill(full, 0.0)
        share = open_weight * ((total - int(full.sum()) * cap) / open_weight.sum().clamp(min=1e-300))
        over = (share >= cap) & ~full
        if not over.any():
            break
        full |= over
    shares = share.floor().long().masked_fill(full, cap)
    left = total - int(shares.sum())
    if left:
        order = torch.arange(n, device=weights.device) if first is None else first.to(weights.device)
        claims = (share - share.floor()).masked_fill(full, -1.0)[order]
        shares[order[claims.argsort(descending=True, stable=True)[:left]]] += 1
    return shares.to(device)
