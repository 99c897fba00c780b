"""What `select` can be asked for: rules.

A rule holds no parameters that are trained; the values carried by the selected scores are the activation's business.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saehooks.errors import ConfigError, WidthError


@dataclass(frozen=True)
class Sparsemax:
    """Scores above the threshold tau for which the sum of ``score - tau`` is 1. Source: arXiv:1602.02068, Alg. 1."""

    def check(self, rows: int, d_sae: int) -> None:
        """Any scores will do."""


@dataclass(frozen=True)
class Entmax:
    """Scores with a positive alpha-entmax probability: ``(alpha - 1) s > tau``. Source: arXiv:1905.05702."""

    alpha: float

    def __post_init__(self) -> None:
        if not 1 < self.alpha <= 2:
            raise ConfigError(f"entmax needs 1 < alpha <= 2, got alpha={self.alpha}; alpha = 2 is sparsemax")

    def check(self, rows: int, d_sae: int) -> None:
        """Any scores will do."""


@dataclass(frozen=True)
class TopK:
    """The k largest scores of each row, positive ones only. Source: arXiv:2406.04093, section 2.3."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"top-k needs k >= 1, got k={self.k}")

    def check(self, rows: int, d_sae: int) -> None:
        """Raise ConfigError if there are fewer than k latents."""
        if self.k > d_sae:
            raise ConfigError(f"top-k with k={self.k} needs at least that many latents, this SAE has {d_sae}")


@dataclass(frozen=True, eq=False)
class Threshold:
    """Scores strictly above a threshold: one number, or one for each latent (d_sae,)."""

    theta: Tensor | float = 0.0

    def check(self, rows: int, d_sae: int) -> None:
        """Raise WidthError unless there is one threshold, or one for each latent."""
        if isinstance(self.theta, Tensor) and self.theta.numel() not in (1, d_sae):
            raise WidthError(f"thresholds of shape {tuple(self.theta.shape)} were given for {d_sae} latents")


@dataclass(frozen=True)
class BatchTopK:
    """The ``k * rows`` largest scores of the whole batch, positive ones only. Source: arXiv:2412.06410."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"batch top-k needs k >= 1, got k={self.k}")

    def check(self, rows: int, d_sae: int) -> None:
        """Raise ConfigError if there are fewer scores than are to be selected."""
        check_budget(self.k * rows, rows, d_sae)


@dataclass(frozen=True, eq=False)
class FeatureChoice:
    """Each latent takes the rows that score highest for it, as many as its budget. Source: arXiv:2411.02124."""

    budgets: Tensor
    """(d_sae,) int64, rows that each latent may take; no more than there are."""

    def check(self, rows: int, d_sae: int) -> None:
        """Raise WidthError unless there is one budget for each latent."""
        if self.budgets.shape != (d_sae,):
            raise WidthError(f"budgets of shape {tuple(self.budgets.shape)} were given for {d_sae} latents")


def check_budget(total: int, rows: int, d_sae: int) -> None:
    """Raise ConfigError if there are fewer scores than are to be selected."""
    if total > rows * d_sae:
        raise ConfigError(f"a budget of {total} matches is larger than the batch: {rows} rows x {d_sae} latents")


RowRule = Sparsemax | Entmax | TopK | Threshold
"""Rules that look at one row at a time."""

BatchRule = BatchTopK | FeatureChoice
"""Rules that compare rows: what a row selects depends on the others."""
