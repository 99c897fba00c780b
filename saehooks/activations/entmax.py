"""Entmax: between softmax and sparsemax, alpha says how sparse; exact supports, alpha fixed or learned."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from saehooks.activations.base import Activation
from saehooks.activations.sparsemax import VALUES
from saehooks.codes import rows_of
from saehooks.errors import ConfigError
from saehooks.kernels import Entmax, Support, path

LOWEST = 1.01
"""Below this a learned alpha does not go: at 1 entmax is softmax, which selects everything."""


class EntmaxActivation(Activation):
    """Select the alpha-entmax support; carry the score itself or the entmax probability.

    Args:
        alpha: in (1, 2]; 2 is sparsemax, smaller selects more. A learned alpha starts here.
        learn_alpha: train one alpha for the SAE, between 1.01 and 2; needs ``values="weight"``, since a support alone
            has no gradient. On a GPU its one number is read back in every step, since selection takes it as a number;
            with a fixed alpha nothing waits.
        values: ``"score"`` or ``"weight"``, as for sparsemax.
    Source: Peters et al. 2019, arXiv:1905.05702; the gradient of alpha: Correia et al. 2019, arXiv:1909.00015.
    """

    name: ClassVar[str] = "entmax"
    takes_padding: ClassVar[bool] = True

    def __init__(self, d_sae: int, *, alpha: float = 1.5, learn_alpha: bool = False, values: str = "score") -> None:
        super().__init__(d_sae)
        if not 1 < alpha <= 2:
            raise ConfigError(f"entmax needs 1 < alpha <= 2, got alpha={alpha}; alpha = 2 is sparsemax")
        if values not in VALUES:
            raise ConfigError(f"values={values!r}: entmax carries one of {', '.join(map(repr, VALUES))}")
        if learn_alpha and values != "weight":
            raise ConfigError("a learned alpha needs values='weight': scores do not depend on alpha")
        self.carries, self.fixed_alpha, self.raw_alpha = values, alpha, None
        if learn_alpha:
            share = (min(max(alpha, LOWEST + 0.01), 1.99) - LOWEST) / (2 - LOWEST)
            self.raw_alpha = nn.Parameter(torch.tensor(share, dtype=torch.float32).logit())

    @property
    def alpha(self) -> Tensor | float:
        """The alpha at hand; a differentiable scalar if learned."""
        if self.raw_alpha is None:
            return self.fixed_alpha
        return LOWEST + (2 - LOWEST) * self.raw_alpha.sigmoid()

    def _number(self) -> float:
        """The alpha at hand; a learned one is read back from its device."""
        return self.fixed_alpha if self.raw_alpha is None else float(torch.as_tensor(self.alpha).detach())

    def rule(self, rows: int = 1, density: Tensor | None = None) -> Entmax:
        return Entmax(self._number())

    def values(self, scores: Tensor, support: Support) -> Tensor:
        if self.carries == "score":
            return scores
        alpha = self.alpha
        if not isinstance(alpha, Tensor):
            alpha = scores.new_full((), alpha, dtype=torch.float64)  # made on the device, not copied there
        return entmax_weights(scores, support.offsets, alpha)

    def extra_repr(self) -> str:
        return f"d_sae={self.d_sae}, alpha={self._number():.3g}, values={self.carries!r}"


def entmax_weights(scores: Tensor, offsets: Tensor, alpha: Tensor) -> Tensor:
    """(nnz,) entmax probabilities over the given supports, differentiable in scores and in alpha (a scalar).

    A row's probabilities are those of its scores alone: of the whole row, if its support is the entmax support. Sums
    are float64; on the GPU path each has one order, so that results repeat, and the host waits for none.
    """
    if scores.dtype != torch.float64 and hasattr(path(scores), "entmax_weights"):
        return _WeightsByKernel.apply(scores, offsets, alpha)
    return _Weights.apply(scores, offsets, alpha)


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, offsets, alpha):
        rows = rows_of(offsets, scores.numel())
        n_rows, power = offsets.numel() - 1, 1 / (float(alpha) - 1)
        wide = scores.double()
        best = wide.new_full((n_rows,), -torch.inf).scatter_reduce(0, rows, wide, "amax")
        scaled = (wide - best[rows]) / power
        tau = wide.new_full((n_rows,), -1.0)
        for _ in range(100):
            above = (scaled - tau[rows]).clamp(min=0)
            slope = torch.where(above > 0, above.pow(power - 1), 0.0)  # 0 ** 0 is 1
            mass = torch.zeros_like(tau).index_add_(0, rows, slope * above)
            step = ((mass - 1) / (power * torch.zeros_like(tau).index_add_(0, rows, slope))).clamp(min=0)
            tau = tau + step
            if not (step > 1e-15).any():
                break
        weights = (scaled - tau[rows]).clamp(min=0).pow(power)
        ctx.save_for_backward(weights, rows, alpha)
        ctx.n_rows, ctx.dtype = n_rows, scores.dtype
        return weights.to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weights, rows, alpha = ctx.saved_tensors
        wide, grad = float(alpha), grad.double()

        def row_sum(entries: Tensor) -> Tensor:
            return entries.new_zeros(ctx.n_rows).index_add_(0, rows, entries)[rows]

        positive = weights > 0
        slope = torch.where(positive, weights.clamp(min=1e-300).pow(2 - wide), 0.0)
        skewed = slope / row_sum(slope)
        d_scores = slope * grad - skewed * row_sum(slope * grad)
        d_alpha = None
        if ctx.needs_input_grad[2]:
            surprise = torch.where(positive, weights * weights.clamp(min=1e-300).log(), 0.0)
            change = (weights - skewed) / (wide - 1) ** 2 - (surprise - skewed * row_sum(surprise)) / (wide - 1)
            d_alpha = (grad * change).sum().to(alpha.dtype)
        return d_scores.to(ctx.dtype), None, d_alpha


class _WeightsByKernel(torch.autograd.Function):
    """`_Weights` on a path with kernels for it."""

    @staticmethod
    def forward(ctx, scores, offsets, alpha):
        weights = path(scores).entmax_weights(scores, offsets, alpha)
        ctx.save_for_backward(weights, offsets, alpha)
        return weights.to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weights, offsets, alpha = ctx.saved_tensors
        learned = ctx.needs_input_grad[2]
        d_scores, d_alpha = path(grad).entmax_gradient(weights, grad, offsets, alpha, learned)
        return d_scores, None, d_alpha.to(alpha.dtype) if learned else None
