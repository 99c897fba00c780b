"""TopK: the k largest scores of each token."""

from __future__ import annotations

from typing import ClassVar

from saehooks.activations.base import Activation
from saehooks.errors import ConfigError
from saehooks.kernels import TopK


class TopKActivation(Activation):
    """Select the k largest positive scores of each row. Source: Gao et al. 2024, arXiv:2406.04093."""

    name: ClassVar[str] = "topk"

    def __init__(self, d_sae: int, *, k: int = 32) -> None:
        super().__init__(d_sae)
        if not 1 <= k <= d_sae:
            raise ConfigError(f"top-k needs 1 <= k <= d_sae, got k={k} with d_sae={d_sae}")
        self.k = k

    def rule(self) -> TopK:
        return TopK(self.k)

    def extra_repr(self) -> str:
        return f"d_sae={self.d_sae}, k={self.k}"
