"""Token-feature matching: a budget of matches for the batch, spent by affinity or by each feature on its own tokens."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from saehooks.activations.base import Activation
from saehooks.activations.topk import RATE, BatchTopKActivation, check_k
from saehooks.activations.zipf import apportion, ranks
from saehooks.errors import ConfigError
from saehooks.kernels import FeatureChoice, Support, Threshold
from saehooks.precision import widened

BUDGETS = ("uniform", "zipf")


class MutualChoiceActivation(BatchTopKActivation):
    """The k * rows largest positive affinities of the batch; the budget is free between tokens and features.

    Selection is that of batchtopk. What differs is the loss that goes with it, aux_zipf, for which the SAE counts
    how often each latent fires. Source: Ayonrinde 2024, arXiv:2411.02124.
    """

    name: ClassVar[str] = "mutual_choice"
    default_loss: ClassVar[Mapping[str, Any]] = MappingProxyType({"aux_zipf": 1 / 32})
    tracks_density: ClassVar[bool] = True


class FeatureChoiceActivation(Activation):
    """In training, each latent takes the tokens that score highest for it, as many as its budget; positive ones only.

    Budgets add up to k * rows. In eval mode each latent has a threshold, the running mean of the smallest score it
    took; a latent that never took a token in training never fires. Give every latent a token: batches of at least
    d_sae / k rows. Usually fine-tuned from mutual choice, with the curve fitted to its densities by `fit_zipf`.

    Args:
        k: mean number of latents of a token.
        budgets: ``"uniform"``: every latent the same, what is left over to the rarest; ``"zipf"``: in proportion to
            ``1 / (rank + zipf_shift)^zipf_exponent``, ranks by running density, none above the rows of the batch.
        zipf_shift, zipf_exponent: of the curve. The paper fits them; the defaults are our choice.
    Source: Ayonrinde 2024, arXiv:2411.02124.
    """

    name: ClassVar[str] = "feature_choice"
    default_loss: ClassVar[Mapping[str, Any]] = MappingProxyType({"aux_zipf": 1 / 32})
    tracks_density: ClassVar[bool] = True
    running: ClassVar[tuple[str, ...]] = ("thresholds",)
    by_latent: ClassVar[Mapping[str, int]] = MappingProxyType({"thresholds": 0, "taken": 0})
    thresholds: Tensor
    taken: Tensor

    def __init__(
        self,
        d_sae: int,
        *,
        k: int = 32,
        budgets: str = "uniform",
        zipf_shift: float = 10.0,
        zipf_exponent: float = 1.0,
    ) -> None:
        super().__init__(d_sae)
        if budgets not in BUDGETS:
            raise ConfigError(f"budgets={budgets!r}: feature choice shares by {' or '.join(map(repr, BUDGETS))}")
        if zipf_shift < 0 or zipf_exponent < 0:
            raise ConfigError(f"zipf_shift and zipf_exponent must not be negative, got {zipf_shift}, {zipf_exponent}")
        self.k, self.budgets = check_k(k, d_sae), budgets
        self.zipf_shift, self.zipf_exponent = zipf_shift, zipf_exponent
        self.register_buffer("thresholds", torch.zeros(d_sae, dtype=torch.float32))
        self.register_buffer("taken", torch.zeros(d_sae, dtype=torch.int64))

    def rule(self, rows: int = 1, density: Tensor | None = None) -> FeatureChoice | Threshold:
        if self.training:
            return FeatureChoice(self.shares(rows, density))
        untaken = torch.where(self.taken.any(), torch.inf, 0.0).to(self.thresholds)
        return Threshold(torch.where(self.taken > 0, self.thresholds, untaken))

    def shares(self, rows: int, density: Tensor | None = None) -> Tensor:
        """(d_sae,) int64 tokens each latent takes of a batch; they add up to k * rows."""
        known = self.thresholds.new_zeros(self.d_sae) if density is None else density
        if self.budgets == "uniform":
            return apportion(torch.ones_like(known), self.k * rows, rows, first=known.argsort(stable=True))
        curve = (widened(ranks(known)) + self.zipf_shift) ** -self.zipf_exponent
        return apportion(curve, self.k * rows, rows)

    @torch.no_grad()
    def observe(self, scores: Tensor, support: Support) -> None:
        smallest = self.smallest_taken(scores, support)
        took = smallest.isfinite()
        self.taken += took
        rate = (1 / widened(self.taken.clamp(min=1))).clamp(min=RATE).to(self.thresholds)
        moved = self.thresholds + rate * (smallest.to(self.thresholds) - self.thresholds)
        self.thresholds.copy_(torch.where(took, moved, self.thresholds))

    def smallest_taken(self, scores: Tensor, support: Support) -> Tensor:
        """(d_sae,) the smallest score that each latent took of a batch, infinite if none."""
        return scores.new_full((self.d_sae,), torch.inf).scatter_reduce(0, support.indices, scores, "amin")

    def extra_repr(self) -> str:
        return f"d_sae={self.d_sae}, k={self.k}, budgets={self.budgets!r}"
