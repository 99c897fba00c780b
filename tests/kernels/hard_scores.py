"""Scores that are hard to select from, and the float64 answer by sorting."""

from __future__ import annotations

import torch
from torch import Tensor

from saehooks.kernels import Support
from saehooks.support import rows_of

KINDS = (
    "random", "trained", "tied", "sorted", "block", "equal", "zero", "spike", "two_level", "geometric", "negative",
)  # fmt: skip


def scores_of(kind: str, rows: int, d_sae: int, scale: float) -> Tensor:
    """(rows, d_sae) float32 scores of a kind, with a fixed seed."""
    made = torch.Generator().manual_seed(0)
    z = torch.randn(rows, d_sae, generator=made)
    ramp = torch.arange(d_sae) / max(1, d_sae - 1)
    if kind == "trained":  # a few directions present, the rest near zero, scores heavy-tailed
        z = 0.1 * z + z.abs().pow(3) * (torch.rand(rows, d_sae, generator=made) < 0.05)
    elif kind == "tied":
        z = z.round(decimals=0)
    elif kind == "sorted":
        z = z.sort(dim=1).values
    elif kind == "block":
        z[:, d_sae // 3 : d_sae // 3 + max(1, d_sae // 16)] += 5.0
    elif kind == "equal":
        z = torch.ones(rows, d_sae)
    elif kind == "zero":
        z = torch.zeros(rows, d_sae)
    elif kind == "spike":
        z = torch.zeros(rows, d_sae)
        z[:, -1] = 1.0
    elif kind == "two_level":  # one class sits on the threshold of the other
        z = torch.where(torch.rand(rows, d_sae, generator=made) < 0.5, 1.0, 1.0 - 2.0 / d_sae)
    elif kind == "geometric":  # each pass of Newton's rule drops few
        z = -torch.logspace(-12, 0, d_sae).expand(rows, -1).clone()
    elif kind == "negative":
        z = -5.0 - ramp.expand(rows, -1).clone()
    return z * scale


def sparsemax_by_sorting(scores: Tensor) -> Tensor:
    """(rows, d_sae) float64 sparsemax weights. Source: arXiv:1602.02068, Alg. 1."""
    z = scores.double() - scores.double().amax(1, keepdim=True)
    ordered = z.sort(1, descending=True).values
    rank = torch.arange(1, z.shape[1] + 1, device=z.device)
    excess = ordered.cumsum(1) - 1
    size = (rank * ordered > excess).sum(1, keepdim=True)
    return (z - excess.gather(1, size - 1) / size).clamp(min=0)


def weights(scores: Tensor, support: Support) -> Tensor:
    """(rows, d_sae) float64 sparsemax weights that a support implies."""
    rows = rows_of(support.offsets, support.indices.numel())
    z = scores.double() - scores.double().amax(1, keepdim=True)
    picked = z[rows, support.indices]
    total = picked.new_zeros(len(z)).index_add(0, rows, picked)
    tau = (total - 1) / support.offsets.diff()
    return torch.zeros_like(z).index_put((rows, support.indices), picked - tau[rows])


def parts(support: Support) -> tuple[Tensor, ...]:
    """Indices, offsets, threshold and, where they are known, scores."""
    found = (support.indices, support.offsets, support.threshold)
    return found if support.scores is None else (*found, support.scores)


def dense_mask(scores: Tensor, support: Support) -> Tensor:
    """(rows, d_sae) bool."""
    rows = rows_of(support.offsets, support.indices.numel())
    return torch.zeros_like(scores, dtype=torch.bool).index_put(
        (rows, support.indices), torch.ones_like(support.indices, dtype=torch.bool)
    )
