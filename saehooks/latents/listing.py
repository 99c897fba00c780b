"""Latents that were found, as rows with their words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saehooks.causal.table import Table, named

if TYPE_CHECKING:
    from saehooks.latents.index import LatentIndex


@dataclass(frozen=True, eq=False, repr=False)
class Listing(Table):
    """Latents with what is known of each, best first."""

    caption: str
    found: list[dict[str, Any]]
    index: LatentIndex

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict for each latent."""
        return [dict(row) for row in self.found]

    @property
    def latents(self) -> list[int]:
        """The latents, best first."""
        return [row["latent"] for row in self.found]

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, place: int) -> Any:
        """The latent at a place of the list, as ``index[latent]``."""
        return self.index[self.latents[place]]

    def _caption(self) -> str:
        return self.caption

    def _shown(self) -> list[dict[str, Any]]:
        rows = named(self.rows(), "latent")
        return [{**row, "density": f"{row['density']:.3%}"} for row in rows]
