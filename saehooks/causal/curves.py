"""Sets of latents: what is left of a metric when the best n are ablated, or everything but them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from saehooks.attachments.request import refuse_others, refuse_unknown
from saehooks.causal.ablation import Ablations, Ablator
from saehooks.causal.metric import as_metric
from saehooks.causal.rank import check_latents
from saehooks.causal.ranking import Ranking
from saehooks.causal.runs import Place, as_data, check_metric, runner
from saehooks.causal.table import Table
from saehooks.causal.words import Origin, check_index, check_ranking, survey_note, words_of
from saehooks.edits import latent_list
from saehooks.errors import ConfigError
from saehooks.hosts.train_mode import warn_in_train_mode
from saehooks.sae import SAE
from saehooks.show.progress import bar
from saehooks.show.values import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COUNTS = (1, 2, 5, 10, 20, 50)
OPTIONS = ("at", "head", "where", "error", "batch_size", "run", "progress")
"""Options of `curve` that it passes to `ablate_sets`."""


@dataclass(frozen=True, eq=False, repr=False)
class SetEffects(Table):
    """What a metric becomes when sets of latents are ablated, or all latents but a set."""

    site: str
    metric: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """Latents each set ablates."""
    clean: Tensor
    """(sequences,) float64, the metric with nothing edited; NaN for sequences an interrupt left out."""
    values: Tensor
    """(sets, sequences) float64."""

    def of(self, name: str) -> float:
        """The metric under one set, the mean over sequences."""
        return float(self.values[self.names.index(name)].nanmean())

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict for each set, the clean run first."""
        clean = float(self.clean.nanmean())
        found = [{"set": "clean", "ablated": 0, "metric": clean, "change": 0.0}]
        for name, size in zip(self.names, self.sizes, strict=True):
            found.append({"set": name, "ablated": size, "metric": self.of(name), "change": self.of(name) - clean})
        return found

    def _caption(self) -> str:
        return f"{self.site}: {self.metric}, mean of {int((~self.clean.isnan()).sum())} sequences"


def ablate_sets(
    model: Any,
    sae: SAE,
    tokens: Any,
    metric: Any = "ce",
    *,
    ablate: Mapping[str, Iterable[int]] | None = None,
    keep: Mapping[str, Iterable[int]] | None = None,
    at: str | None = None,
    head: int | None = None,
    where: Any = None,
    error: Literal["keep", "drop"] = "keep",
    batch_size: int | None = None,
    run: Callable[[Tensor], Any] | None = None,
    progress: bool | None = None,
    **unknown: Any,
) -> SetEffects:
    """Measure a metric exactly under several sets of latents, many in one forward.

    Args:
        model, sae, tokens, metric, at, head, where, batch_size, run, progress: as in `rank_latents`.
        ablate: sets of latents to set to zero, by name.
        keep: sets of latents to keep while all others are set to zero, by name.
        error: ``"keep"``: the reconstruction error stays in the activation; ``"drop"``: it does not.
    Raises:
        ConfigError: no set, one name twice, or empty data. LatentError: a latent out of range.
    """
    refuse_others(ablate_sets, unknown)
    if error not in ("keep", "drop"):
        raise ConfigError(f"error={error!r}; expected 'keep' or 'drop'")
    place, measured = Place(model, sae, at, head, where), as_metric(metric)
    table, names = _table(sae, ablate or {}, keep or {})
    check_metric(place, measured)
    warn_in_train_mode(place.host.model, "ablating sets of latents")
    data = as_data(place.host, tokens, batch_size)
    measure = Ablator(place, measured, runner(place.host, run), error=error, batch_size=batch_size)
    with bar(progress) as shown:
        found: Ablations = measure(data, table, shown)
    sizes = tuple(table.sum(1).tolist())
    return SetEffects(place.site.name, measured.name, names, sizes, found.clean, found.values)


def _table(sae: SAE, ablate: Mapping[str, Any], keep: Mapping[str, Any]) -> tuple[Tensor, tuple[str, ...]]:
    """(sets, d_sae) bool, what each set zeroes; and the sets' names."""
    twice = set(ablate) & set(keep)
    if twice or not (ablate or keep):
        raise ConfigError(
            f"the name {twice.pop()!r} is given twice" if twice else "give sets of latents: ablate={'top': [1, 2]}"
        )
    rows = []
    for sets, zeroed in ((ablate, True), (keep, False)):
        for latents in sets.values():
            listed = latent_list(latents)
            check_latents(sae, listed)
            row = torch.full((sae.d_sae,), not zeroed)
            row[list(listed)] = zeroed
            rows.append(row)
    return torch.stack(rows), (*ablate, *keep)


@dataclass(frozen=True, eq=False, repr=False)
class Curve(Table):
    """Necessity and sufficiency: a metric against how many of the best latents are ablated, or kept alone."""

    site: str
    metric: str
    clean: float
    """The metric with nothing edited."""
    none_kept: float
    """The metric with every latent ablated."""
    counts: tuple[int, ...]
    ablated: tuple[float, ...]
    """The metric with the best n ablated: falls early when they are necessary."""
    ablated_random: tuple[float, ...]
    """With n random active latents ablated, the mean over draws."""
    kept: tuple[float, ...]
    """With all but the best n ablated: rises early when they are sufficient."""
    kept_random: tuple[float, ...]
    """With all but n random active latents ablated, the mean over draws."""
    n_sequences: int
    draws: int
    latents: tuple[int, ...] = ()
    """The latents, best first, as many as the largest n."""
    index: Any = None
    """An index of the latents, for their words in the table."""
    head: int | None = None
    """The one attention head whose latents these are, or None for all of them joined."""
    fingerprint: str = ""
    """Of the SAE, by which an index of another one is refused."""

    def with_index(self, index: Any) -> Curve:
        """The same curve, with what the latents that each n adds stand for, by a `saehooks.LatentIndex`.

        Raises:
            ConfigError: an index of another SAE or site.
        """
        check_index(index, Origin(self.site, self.head, self.fingerprint))
        return replace(self, index=index)

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict for each n."""
        columns = (self.counts, self.ablated, self.ablated_random, self.kept, self.kept_random)
        names = ("n", "top n ablated", "n random ablated", "only top n kept", "only n random kept")
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def _shown(self) -> list[dict[str, Any]]:
        rows = self.rows()
        if self.index is None:
            return rows
        for row, before in zip(rows, (0, *self.counts), strict=False):
            added = self.latents[before : row["n"]][:3]
            words = [f"{latent} {words_of(self.index, self.site, latent, 2)}".rstrip() for latent in added]
            row["adds"] = "; ".join(words) + ("; …" if row["n"] - before > 3 else "")
        return rows

    def plot(self) -> Figure:
        """The four curves."""
        from saehooks.show.figures import INK, effect_curves

        names = list(self.rows()[0])[1:]
        lines = (self.ablated, self.ablated_random, self.kept, self.kept_random)
        figure = effect_curves(
            {name: (self.counts, line) for name, line in zip(names, lines, strict=True)},
            xlabel="n",
            ylabel=self.metric,
            title=self._caption(),
        )
        figure.axes[0].set_xscale("log")
        figure.axes[0].axhline(self.clean, color=INK, linewidth=0.8)
        figure.axes[0].axhline(self.none_kept, color=INK, linewidth=0.8, linestyle=":")
        return figure

    def _caption(self) -> str:
        text = f"{self.site}: {self.metric}, clean {number(self.clean)}, all latents ablated {number(self.none_kept)}"
        return text + survey_note(self.index)


def curve(
    model: Any,
    sae: SAE,
    tokens: Any,
    latents: Ranking | Sequence[int],
    metric: Any = "ce",
    *,
    counts: Sequence[int] = COUNTS,
    draws: int = 3,
    seed: int = 0,
    index: Any = None,
    **options: Any,
) -> Curve:
    """Ablate the best n latents, and all but them, for several n; and as many random active ones beside it.

    Measure on other data than the latents were ranked on.

    Args:
        model, sae, tokens, metric: as in `rank_latents`.
        latents: a ranking, or latents best first.
        counts: the n.
        draws: how many random sets to average over, drawn from the latents that are selected in the data.
        seed: of the draws.
        index: a `saehooks.LatentIndex` of this site: the table then says what the latents that each n adds stand for.
        options: ``at``, ``head``, ``where``, ``error``, ``batch_size``, ``run``, ``progress``, as in `ablate_sets`.
    Raises:
        ConfigError: an n is larger than the number of latents given, or of those active in the data; a ranking or an
            index of another SAE or site.
    """
    refuse_unknown("curve", [name for name in options if name not in OPTIONS], OPTIONS)
    best = latents.latents.tolist() if isinstance(latents, Ranking) else list(latent_list(latents))
    if not counts or min(counts) < 1 or max(counts) > len(best):
        raise ConfigError(f"counts must lie in 1 .. {len(best)}, the latents given; got {tuple(counts)}")
    if draws < 1:
        raise ConfigError(f"draws must be at least 1, got {draws}")
    index = latents.index if index is None and isinstance(latents, Ranking) else index
    origin = Place(model, sae, options.get("at"), options.get("head"), None).origin
    if isinstance(latents, Ranking):
        check_ranking(latents, origin)
    check_index(index, origin)
    pool = active_latents(model, sae, tokens, **options)
    if max(counts) > len(pool):
        raise ConfigError(
            f"only {len(pool)} latents are active in this data, so {max(counts)} random ones cannot be drawn: "
            f"give more data, or counts= of at most {len(pool)}"
        )
    generator = torch.Generator().manual_seed(seed)
    ablate: dict[str, list[int]] = {"all": list(range(sae.d_sae))}
    keep: dict[str, list[int]] = {}
    for n in counts:
        ablate[f"top {n}"], keep[f"keep top {n}"] = best[:n], best[:n]
        for draw in range(draws):
            chosen = pool[torch.randperm(len(pool), generator=generator)[:n]].tolist()
            ablate[f"random {n}/{draw}"], keep[f"keep random {n}/{draw}"] = chosen, chosen
    found = ablate_sets(model, sae, tokens, metric, ablate=ablate, keep=keep, **options)

    def mean(name: str) -> tuple[float, ...]:
        return tuple(sum(found.of(f"{name} {n}/{i}") for i in range(draws)) / draws for n in counts)

    return Curve(
        site=found.site,
        metric=found.metric,
        clean=float(found.clean.nanmean()),
        none_kept=found.of("all"),
        counts=tuple(counts),
        ablated=tuple(found.of(f"top {n}") for n in counts),
        ablated_random=mean("random"),
        kept=tuple(found.of(f"keep top {n}") for n in counts),
        kept_random=mean("keep random"),
        n_sequences=int((~found.clean.isnan()).sum()),
        draws=draws,
        latents=tuple(best[: max(counts)]),
        index=index,
        head=origin.head,
        fingerprint=origin.fingerprint,
    )


def active_latents(model: Any, sae: SAE, tokens: Any, **options: Any) -> Tensor:
    """(n,) int64, the latents selected somewhere in the data, in ascending order.

    Args:
        options: ``at``, ``head``, ``where``, ``batch_size``, ``run``, as in `rank_latents`; others are ignored.
    """
    place = Place(model, sae, options.get("at"), options.get("head"), options.get("where"))
    run = runner(place.host, options.get("run"))
    counts = torch.zeros(sae.d_sae, dtype=torch.int64)
    for part in as_data(place.host, tokens, options.get("batch_size")).batches:
        with torch.no_grad(), place.attached(rows=part.rows) as trace:
            run(part.inputs)
        for one in trace.forwards:
            counts += one.codes.where(one.mask).counts().cpu()
    place.check_used()
    return counts.nonzero()[:, 0]
