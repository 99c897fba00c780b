"""Entmax: between softmax and sparsemax, alpha says how sparse; exact supports, alpha fixed or learned."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from saehooks.activations.base import Activation
from saehooks.activations.sparsemax import VALUES
from saehooks.errors import ConfigError
from saehooks.kernels import Entmax, Support, entmax_weights
from saehooks.precision import widest

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
        self.value_kind, self.fixed_alpha, self.raw_alpha = values, alpha, None
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

    @property
    def carries_scores(self) -> bool:
        return self.value_kind == "score"

    def values(self, scores: Tensor, support: Support) -> Tensor:
        if self.carries_scores:
            return scores
        alpha = self.alpha
        if not isinstance(alpha, Tensor):
            alpha = scores.new_full((), alpha, dtype=widest(scores.device))  # made on the device, not copied there
        return entmax_weights(scores, support.offsets, alpha)

    def extra_repr(self) -> str:
        return f"d_sae={self.d_sae}, alpha={self._number():.3g}, values={self.value_kind!r}"
