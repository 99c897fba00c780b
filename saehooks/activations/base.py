"""What an activation is: a rule that selects (no gradient), then values on the selected scores (with gradient)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saehooks.errors import ConfigError
from saehooks.kernels import BatchRule, RowRule, Support


class Activation(nn.Module):
    """Which scores are active, and what value each carries. Subclasses override `rule` and, if not relu, `values`."""

    name: ClassVar[str]
    default_loss: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Settings of the `LossConfig` that goes with this activation."""
    tracks_density: ClassVar[bool] = False
    """Whether the SAE must count how often each latent fires."""
    takes_padding: ClassVar[bool] = False
    """Whether its values may be asked of codes with padding past the last row: see `saehooks.kernels.Capacity`."""

    by_latent: ClassVar[Mapping[str, int]] = MappingProxyType({})
    """Names of the tensors that hold something for each latent, with the axis along which latents lie."""
    running: ClassVar[tuple[str, ...]] = ()
    """Buffers that hold running means: in bfloat16 a small step would be rounded away, so they stay float32 there."""

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.d_sae = d_sae

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Activation:
        """What ``.to``, ``.half`` and their kin call: `running` buffers move, and are never narrowed."""
        before = {name: getattr(self, name) for name in self.running}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            kept = new if old.is_meta or new.is_meta else old
            setattr(self, name, kept.to(new.device, torch.promote_types(new.dtype, torch.float32)))
        return self

    def rule(self, rows: int = 1, density: Tensor | None = None) -> RowRule | BatchRule:
        """How the kernels select.

        Args:
            rows: of the batch at hand; only rules across rows look at it.
            density: (d_sae,) share of rows in which each latent fired, where it is tracked.
        """
        raise TypeError(f"{type(self).__name__} does not say how it selects: override rule()")

    @property
    def rank(self) -> Callable[[Tensor], Tensor] | None:
        """From dense scores (rows, d_sae) to what a top-k rule compares; None for the positive scores."""
        return None

    def values(self, scores: Tensor, support: Support) -> Tensor:
        """(nnz,) activations of the selected scores (nnz,), differentiable in them."""
        return scores.relu()

    @property
    def carries_scores(self) -> bool:
        """Whether `values` are the selected scores themselves, so that both can be made at once."""
        return False

    def active(self, scores: Tensor, support: Support) -> Tensor | None:
        """(nnz,) bool, which of the selected scores count as active; None for all.

        An activation whose gradient needs scores that are not active (jumprelu) selects more than it activates.
        """
        return None

    def check_reselect(self, amount: float) -> None:
        """Raise ConfigError if `reselect` cannot be asked for so much."""
        raise ConfigError(
            f"reselect= chooses again among refined scores: it is for sparsemax with values='score' and for topk with "
            f"negative='drop', not for {self.name}"
        )

    def reselect(self, values: Tensor, support: Support, amount: float) -> Tensor:
        """(nnz,) bool, which of the selected latents stay when the rule is applied to their refined scores (nnz,)."""
        raise TypeError(f"{type(self).__name__} does not say how it selects again: override reselect()")

    def penalised(self, scores: Tensor, support: Support, values: Tensor) -> Tensor:
        """(nnz,) magnitudes that the l1 penalty charges, differentiable."""
        return values.abs()

    def count(self, scores: Tensor, support: Support) -> Tensor | None:
        """(nnz,) 0 or 1 whose sum is L0, with a gradient; None where the activation offers none."""
        return None

    def observe(self, scores: Tensor, support: Support) -> None:
        """Update running statistics from the scores (nnz,) of a training batch; no gradient, never in eval mode."""

    def initialise(self, queries: Tensor, scores: Callable[[], Iterable[Tensor]]) -> None:
        """Set what is best set from data, before training.

        Args:
            queries: (rows, d), what the dictionary multiplies with its keys.
            scores: gives the dense scores of these rows in chunks (chunk, d_sae).
        """

    def extra_repr(self) -> str:
        return f"d_sae={self.d_sae}"
