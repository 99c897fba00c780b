"""What an activation is: a rule that selects (no gradient), then values on the selected scores (with gradient)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from saehooks.kernels import RowRule, Support


class Activation(nn.Module):
    """Which scores are active, and what value each carries. Subclasses override `rule` and, if not relu, `values`."""

    name: ClassVar[str]

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.d_sae = d_sae

    def rule(self) -> RowRule:
        """How the kernels select."""
        raise TypeError(f"{type(self).__name__} does not say how it selects: override rule()")

    def values(self, scores: Tensor, support: Support) -> Tensor:
        """(nnz,) activations of the selected scores (nnz,), differentiable in them."""
        return scores.relu()

    def extra_repr(self) -> str:
        return f"d_sae={self.d_sae}"
