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
    """(rows,) the score above which latents were selected (for top-k: the smallest selected score)."""


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


RowRule = Sparsemax | TopK | Threshold
