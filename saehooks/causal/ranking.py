"""The table that `rank_latents` gives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from saehooks.causal.table import SHOWN, Table, named
from saehooks.causal.words import Origin, check_index, context_of, labelled, survey_note, words_of
from saehooks.errors import ConfigError, LatentError
from saehooks.show.values import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDERS = ("absolute", "lowering", "raising")


class Agreement(NamedTuple):
    """How well attribution predicts exact ablation."""

    spearman: float
    """Rank correlation of the signed effects; NaN with fewer than 3 latents, or when one side is constant."""
    sign: float
    """Share of latents whose two effects have the same sign."""
    n: int
    """Latents measured both ways."""


@dataclass(frozen=True, eq=False, repr=False)
class Ranking(Table):
    """Latents by their effect on a metric: what it becomes when a latent is ablated, minus what it is.

    The latents measured exactly come first, by exact effect; after them the others, by attribution.
    """

    site: str
    metric: str
    order: str
    """``"absolute"``: largest change first; ``"lowering"``, ``"raising"``: largest fall or rise of the metric first."""
    method: str
    """How the attribution was made."""
    clean: float
    """The metric with nothing ablated, the mean over sequences."""
    n_sequences: int
    latents: Tensor
    """(n,) int64, best first: every latent that was selected somewhere in the data."""
    attribution: Tensor
    """(n,) float64, first-order estimate of the effect, the mean over sequences."""
    exact: Tensor
    """(n,) float64, effect measured by ablation, the mean over sequences; NaN where it was not measured."""
    tokens: Tensor
    """(n,) int64, positions where the latent was selected."""
    sequences: Tensor
    """(n,) int64, sequences in which it was selected."""
    mean_value: Tensor
    """(n,) float64, its mean activation where it was selected."""
    complete: bool = True
    """False when an interrupt ended it early: then the effects are those of the sequences that were done."""
    cost: dict[str, float] = field(default_factory=dict)
    """What it took: sequences run forward and backward, and edited sequences run after the site."""
    index: Any = None
    """A `saehooks.LatentIndex`, whose words stand beside the latents; None for bare numbers."""
    head: int | None = None
    """The one attention head whose latents these are, or None for all of them joined."""
    fingerprint: str = ""
    """Of the SAE, by which an index of another one is refused."""

    @property
    def origin(self) -> Origin:
        """Which latents are ranked."""
        return Origin(self.site, self.head, self.fingerprint)

    def with_index(self, index: Any) -> Ranking:
        """The same ranking, with what each latent stands for by a `saehooks.LatentIndex` of the same SAE and site.

        Raises:
            ConfigError: an index of another SAE or site.
        """
        check_index(index, self.origin)
        return replace(self, index=index)

    @property
    def effect(self) -> Tensor:
        """(n,) float64, the exact effect where it was measured, else the attribution."""
        return torch.where(self.exact.isnan(), self.attribution, self.exact)

    def top(self, n: int) -> list[int]:
        """The best n latents."""
        return self.latents[:n].tolist()

    def __getitem__(self, place: Any) -> Any:
        raise ConfigError(
            ".top(n) of a ranking gives the best latents, .rows(n) what is known of them, .of(latent) that of one; "
            f"got [{place!r}]"
        )

    __iter__ = None

    @property
    def agreement(self) -> Agreement:
        """Attribution against exact ablation, over the latents that were measured exactly.

        Raises:
            ConfigError: none was.
        """
        both = ~self.exact.isnan()
        if not bool(both.any()):
            raise ConfigError("no latent was ablated exactly: rank with exact=64 to compare")
        one, other = self.attribution[both], self.exact[both]
        same = float((one.sign() == other.sign()).double().mean())
        return Agreement(spearman(one, other), same, int(both.sum()))

    def of(self, latent: int) -> dict[str, Any]:
        """The row of one latent.

        Raises:
            LatentError: it is not in the ranking.
        """
        place = (self.latents == latent).nonzero()
        if not len(place):
            raise LatentError(f"latent {latent} was never selected in this data, so it is not ranked")
        return self._row(int(place[0, 0]))

    def rows(self, n: int | None = None) -> list[dict[str, Any]]:
        """The best n latents, or all, as plain dicts."""
        return [self._row(i) for i in range(len(self))][:n] if n is None else [self._row(i) for i in self._first(n)]

    def _first(self, n: int) -> range:
        return range(min(n, len(self)))

    def _row(self, i: int) -> dict[str, Any]:
        exact = float(self.exact[i])
        return {
            "rank": i + 1,
            "latent": int(self.latents[i]),
            "attribution": float(self.attribution[i]),
            "exact": None if exact != exact else exact,
            "tokens": int(self.tokens[i]),
            "sequences": int(self.sequences[i]),
            "mean_value": float(self.mean_value[i]),
        }

    def plot(self, n: int = 20, index: Any = None) -> Figure:
        """Bars of the best n latents' effects, with their words by an index.

        Raises:
            ConfigError: an index of another SAE or site.
        """
        from saehooks.show.figures import ranking_bars

        check_index(index, self.origin)
        rows = self.rows(n)
        return ranking_bars(
            [labelled(index or self.index, self.site, row["latent"]) for row in rows],
            self.effect[: len(rows)].tolist(),
            title=f"{self.site}: {len(rows)} of {len(self)} active latents",
            xlabel=f"change of {self.metric} when ablated",
        )

    def plot_agreement(self) -> Figure:
        """Attribution against exact ablation, a dot for each latent measured both ways."""
        from saehooks.show.effects import scatter

        found, both = self.agreement, ~self.exact.isnan()
        return scatter(
            self.attribution[both],
            self.exact[both],
            xlabel=f"attribution ({self.method})",
            ylabel="exact ablation",
            title=f"{self.metric}: Spearman {found.spearman:.2f} over {found.n} latents",
        )

    def _caption(self) -> str:
        text = f"{self.site}: effect on {self.metric} (clean {number(self.clean)}) of ablating each latent; "
        text += f"{len(self):,} active in {self.n_sequences:,} sequence{'s' * (self.n_sequences != 1)}"
        measured = int((~self.exact.isnan()).sum())
        if measured:
            text += f"; {measured} ablated exactly"
            text += f", Spearman {self.agreement.spearman:.2f}" if isfinite(self.agreement.spearman) else ""
        return text + ("" if self.complete else "; interrupted, partial") + survey_note(self.index)

    def _shown(self) -> list[dict[str, Any]]:
        rows = named(self.rows(SHOWN), "latent")
        if self.index is None:
            return rows
        words = [{"stands for": words_of(self.index, self.site, int(row["latent"]))} for row in rows]
        return [
            {"rank": row["rank"], "latent": row["latent"], **word, **row} for row, word in zip(rows, words, strict=True)
        ]

    def _shown_in_html(self) -> list[dict[str, Any]]:
        rows = self._shown()
        if self.index is None:
            return rows
        return [{**row, "strongest at": context_of(self.index, self.site, int(row["latent"]))} for row in rows]

    def __len__(self) -> int:
        return len(self.latents)


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation, ties sharing the mean of their ranks; NaN with fewer than 3 values or a constant side.

    >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 30.0, 20.0])), 6)
    0.5
    """
    if len(one) < 3:
        return float("nan")
    ranks = torch.stack([_ranks(one), _ranks(other)])
    centred = ranks - ranks.mean(1, keepdim=True)
    norms = centred.norm(dim=1).prod()
    return float((centred[0] * centred[1]).sum() / norms) if norms > 0 else float("nan")


def _ranks(values: Tensor) -> Tensor:
    """Rank of each value, float64, equal values sharing the mean of theirs."""
    _, group, sizes = torch.unique(values, return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()
    return (last - (sizes.double() - 1) / 2)[group]
