"""What activations and densities of some of the latents, or some of the rows, have to ask of the other ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from saehooks.activations import (
    Activation,
    EntmaxActivation,
    FeatureChoiceActivation,
    JumpReLUActivation,
    LatentDensity,
    SparsemaxActivation,
    TopKActivation,
)
from saehooks.kernels import Support
from saehooks.ranks.grid import Ranks
from saehooks.ranks.products import entmax_weights, largest_of_rows, newton_threshold, simplex_weights


class ShardedDensity(LatentDensity):
    """Counts the rows of all ranks."""

    ranks: Ranks

    def update(self, counts: Tensor, rows: int) -> None:
        if self.tracked:
            super().update(self.ranks.over_rows(counts.clone()), rows * self.ranks.data)


class ShardedSparsemax(SparsemaxActivation):
    """Weights of a token sum to 1 over the latents of all ranks."""

    ranks: Ranks

    def values(self, scores: Tensor, support: Support) -> Tensor:
        if self.value_kind == "score":
            return scores
        return simplex_weights(scores, support.rows, support.n_rows, self.ranks)

    def reselect(self, values: Tensor, support: Support, amount: float) -> Tensor:
        scaled, rows = values.double() * amount, support.rows
        largest = scaled.new_full((support.n_rows,), -torch.inf).scatter_reduce(0, rows, scaled, "amax")
        return ~(scaled <= newton_threshold(scaled, rows, largest - 1, 2.0, self.ranks)[rows])


class ShardedTopK(TopKActivation):
    """Chooses again among the latents of all ranks."""

    ranks: Ranks

    def reselect(self, values: Tensor, support: Support, amount: float) -> Tensor:
        return largest_of_rows(values, support, int(amount), self.k, self.ranks)[1]


class ShardedEntmax(EntmaxActivation):
    """Probabilities of a token sum to 1 over the latents of all ranks, which have one alpha."""

    ranks: Ranks

    def values(self, scores: Tensor, support: Support) -> Tensor:
        if self.value_kind == "score":
            return scores
        alpha = self.alpha
        if not isinstance(alpha, Tensor):
            alpha = scores.new_full((), alpha, dtype=torch.float64)
        return entmax_weights(scores, support, alpha, self.ranks)


class ShardedJumpReLU(JumpReLUActivation):
    """Thresholds start from the scores of all ranks."""

    ranks: Ranks

    def largest(self, scores: Iterable[Tensor], rows: int, count: int) -> Tensor:
        found = super().largest(scores, rows, min(count, rows * self.d_sae))
        table = found.new_full((count,), -torch.inf)
        table[: len(found)] = found
        return self.ranks.all_latents(table).topk(count).values


class ShardedFeatureChoice(FeatureChoiceActivation):
    """Budgets are shared among the latents of all ranks, and spent on the rows of all."""

    ranks: Ranks

    def shares(self, rows: int, density: Tensor | None = None) -> Tensor:
        known = self.thresholds.new_zeros(self.d_sae) if density is None else density
        return self.ranks.own_latents(super().shares(rows * self.ranks.data, self.ranks.all_latents(known)))

    def smallest_taken(self, scores: Tensor, support: Support) -> Tensor:
        return self.ranks.over_rows(super().smallest_taken(scores, support), dist.ReduceOp.MIN)


SHARDED: dict[type[Activation], type[Activation]] = {
    kind.__mro__[1]: kind
    for kind in (ShardedSparsemax, ShardedTopK, ShardedEntmax, ShardedJumpReLU, ShardedFeatureChoice)
}
"""By the activation of one process; the others ask nothing of other ranks."""
