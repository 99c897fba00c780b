"""Sparsemax: the projection of the scores onto the simplex chooses, for every token, how many latents it uses."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from saehooks.activations.base import Activation
from saehooks.errors import ConfigError
from saehooks.kernels import Sparsemax, Support, select_rows, simplex_thresholds, simplex_weights
from saehooks.precision import widened
from saehooks.support import rows_of

VALUES = ("score", "weight")


class SparsemaxActivation(Activation):
    """Select the sparsemax support; carry the score itself (``"score"``) or the sparsemax weight (``"weight"``).

    ``"score"`` is what the authors of the Sparsemax SAE run, and learns faster; a selected score can be negative.
    ``"weight"`` is the attention of their text: weights of a token are positive and sum to 1.
    Source: Martins & Astudillo 2016, arXiv:1602.02068.
    """

    name: ClassVar[str] = "sparsemax"
    takes_padding: ClassVar[bool] = True

    def __init__(self, d_sae: int, *, values: str = "score") -> None:
        super().__init__(d_sae)
        if values not in VALUES:
            raise ConfigError(f"values={values!r}: sparsemax carries one of {', '.join(map(repr, VALUES))}")
        self.value_kind = values

    def rule(self, rows: int = 1, density: Tensor | None = None) -> Sparsemax:
        return Sparsemax()

    @property
    def carries_scores(self) -> bool:
        return self.value_kind == "score"

    def values(self, scores: Tensor, support: Support) -> Tensor:
        if self.carries_scores:
            return scores
        return simplex_weights(scores, support.offsets)

    def check_reselect(self, amount: float) -> None:
        if self.value_kind != "score":
            super().check_reselect(amount)
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 < amount < float("inf"):
            raise ConfigError(f"reselect={amount!r}: write by how much refined scores count more, such as 1.4")

    def reselect(self, values: Tensor, support: Support, amount: float) -> Tensor:
        """The support of ``sparsemax(amount * values)`` in each row."""
        thresholds = simplex_thresholds(values, support.offsets, scale=amount)
        return ~(widened(values) * amount <= thresholds[support.rows])

    def extra_repr(self) -> str:
        return f"d_sae={self.d_sae}, values={self.value_kind!r}"


class SparsemaxResult(NamedTuple):
    """What `sparsemax` returns."""

    probs: Tensor
    """Same shape as the scores: the projection, non-negative, summing to 1 along ``dim``."""
    support_size: Tensor
    """int64, shape without ``dim``: how many entries are above the threshold."""
    tau: Tensor
    """Shape without ``dim``: the threshold, ``probs = max(scores - tau, 0)``."""


def sparsemax(scores: Tensor, dim: int = -1) -> SparsemaxResult:
    """Project scores onto the probability simplex along ``dim``, without sorting them.

    Args:
        scores: floating, any shape.
        dim: the axis of the alternatives.
    Returns:
        SparsemaxResult of probs, support_size and tau; differentiable in ``scores``. A row with a NaN, or without
        a finite score, gives NaN probs.
    Source: Martins & Astudillo 2016, arXiv:1602.02068, Alg. 1.

    >>> probs, size, tau = sparsemax(torch.tensor([1.0, 0.5, -1.0]))
    >>> probs, int(size), float(tau)
    (tensor([0.7500, 0.2500, 0.0000]), 2, 0.25)
    """
    if not scores.is_floating_point():
        raise ConfigError(f"sparsemax needs floating scores, got {scores.dtype}; write sparsemax(scores.float())")
    moved = scores.movedim(dim, -1)
    if moved.shape[-1] == 0:
        raise ConfigError("sparsemax over an empty axis: there is nothing to choose from")
    flat = moved.reshape(-1, moved.shape[-1])
    wide = flat if flat.dtype == torch.float64 else flat.float()
    support = select_rows(wide.detach().contiguous(), Sparsemax())
    rows = rows_of(support.offsets, support.indices.numel())
    picked = wide[rows, support.indices]
    weights = simplex_weights(picked, support.offsets)
    finite = (picked - picked).isfinite()
    weights = torch.where(finite, weights, torch.nan)
    probs = torch.zeros_like(wide).index_put((rows, support.indices), weights).to(scores.dtype)
    shape = moved.shape[:-1]
    probs = probs.reshape(moved.shape).movedim(-1, dim)
    return SparsemaxResult(
        probs, support.offsets.diff().reshape(shape), support.threshold.to(scores.dtype).reshape(shape)
    )
