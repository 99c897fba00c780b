"""Latents that were found, as rows with their words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saehooks.causal.table import SHOWN, Table, named
from saehooks.causal.words import labelled, survey_note
from saehooks.latents.latent import Latent
from saehooks.latents.result import SurveyResult
from saehooks.latents.views import strongest_html
from saehooks.show.values import number, visible
from saehooks.trace import Forward


@dataclass(frozen=True, eq=False, repr=False)
class Listing(Table):
    """Latents with what is known of each, best first."""

    caption: str
    found: list[dict[str, Any]]
    index: SurveyResult

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict for each latent."""
        return [dict(row) for row in self.found]

    @property
    def latents(self) -> list[int]:
        """The latents, best first."""
        return [row["latent"] for row in self.found]

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, place: int) -> Latent:
        """The latent at a place of the list, as ``index[latent]``."""
        return Latent(self.index, self.latents[place])

    def _caption(self) -> str:
        return self.caption

    def _shown(self) -> list[dict[str, Any]]:
        rows = named(self.rows(), "latent")
        return [{**row, "density": f"{row['density']:.3%}"} for row in rows]

    def _shown_in_html(self) -> list[dict[str, Any]]:
        return [{**row, "strongest at": strongest_html(self.index, int(row["latent"]))} for row in self._shown()]


@dataclass(frozen=True, eq=False, repr=False)
class TokenListing(Table):
    """The strongest latents of each token of a trace, in words."""

    index: SurveyResult
    forward: Forward
    k: int

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict for each token: its text's number, position, the token, and its latents in words."""
        return [row for text in range(len(self.forward.codes)) for row in self._rows_of(text)]

    def _rows_of(self, text: int) -> list[dict[str, Any]]:
        forward = self.forward
        top, sizes = forward.codes[text].top(self.k), forward.support_size[text].tolist()
        rows = []
        for place, token in enumerate(forward.token_strings(text)):
            pairs = zip(top.latents[place].tolist(), top.values[place].tolist(), strict=True)
            words = [f"{labelled(self.index, self.index.site, a)} ({number(v)})" for a, v in pairs if a >= 0]
            rows.append(
                {
                    "text": text,
                    "pos": None if forward.start is None else forward.start + place,
                    "token": visible(token),
                    "support": sizes[place],
                    "strongest": "; ".join(words),
                }
            )
        return rows

    def _caption(self) -> str:
        return f"{self.index.site}: the {self.k} strongest latents of each token" + survey_note(self.index)

    def _shown(self) -> list[dict[str, Any]]:
        return self._rows_of(0)[: 2 * SHOWN] if len(self.forward.codes) else []
