"""What `select` can be asked for: each rule says which scores of a row are selected.

A rule holds no parameters that are trained; the values carried by the selected scores are the activation's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from saehooks.errors import ConfigError


class Support(NamedTuple):
    """Which latents each row selected, in compressed sparse rows."""

    indices: Tensor
    """(nnz,) int64, ascending inside a row."""
    offsets: Tensor
    """(rows + 1,) int64."""
    threshold: Tensor
    """(rows,) the score above which latents were selected (for top-k: the smallest selected score, or 0 if
    fewer than k are positive)."""
    scores: Tensor | None = None
    """(nnz,) the selected scores, where selection had them at hand: they need not be computed again."""


@dataclass(frozen=True)
class Sparsemax:
    """Scores above the threshold tau for which the sum of ``score - tau`` is 1. Source: arXiv:1602.02068, Alg. 1."""


@dataclass(frozen=True)
class TopK:
    """The k largest scores of each row, positive ones only. Source: arXiv:2406.04093, section 2.3."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"top-k needs k >= 1, got k={self.k}")


@dataclass(frozen=True, eq=False)
class Threshold:
    """Scores strictly above a threshold: one number, or one for each latent (d_sae,)."""

    theta: Tensor | float = 0.0


@dataclass(frozen=True)
class Entmax:
    """Scores with a positive alpha-entmax probability: ``(alpha - 1) s > tau``. Source: arXiv:1905.05702."""

    alpha: float

    def __post_init__(self) -> None:
        if not 1 < self.alpha <= 2:
            raise ConfigError(f"entmax needs 1 < alpha <= 2, got alpha={self.alpha}; alpha = 2 is sparsemax")


@dataclass(frozen=True)
class BatchTopK:
    """The ``k * rows`` largest scores of the whole batch, positive ones only. Source: arXiv:2412.06410."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"batch top-k needs k >= 1, got k={self.k}")


@dataclass(frozen=True, eq=False)
class FeatureChoice:
    """Each latent takes the rows that score highest for it, as many as its budget. Source: arXiv:2411.02124."""

    budgets: Tensor
    """(d_sae,) int64, rows that each latent may take; no more than there are."""


RowRule = Sparsemax | Entmax | TopK | Threshold
"""Rules that look at one row at a time."""

BatchRule = BatchTopK | FeatureChoice
"""Rules that compare rows: what a row selects depends on the others."""
