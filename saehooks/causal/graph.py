"""Edges between latents of two SAEs: a small attribution graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehooks.attachments.request import refuse_others
from saehooks.causal.attribution import add_products, gradient
from saehooks.causal.metric import Batch, Metric, as_metric
from saehooks.causal.runs import Data, Inputs, Place, Run, as_data, check_metric, runner
from saehooks.causal.table import SHOWN, Table, named
from saehooks.causal.words import Origin, check_index, labelled, survey_note, words_of
from saehooks.codes import Codes
from saehooks.errors import ConfigError
from saehooks.hosts.frozen import frozen
from saehooks.hosts.train_mode import warn_in_train_mode
from saehooks.sae import SAE
from saehooks.show.progress import Bar, bar
from saehooks.trace import Forward
from saehooks.training.signals import Interruptions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Graph(Table):
    """Latents of two sites, and how much of the earlier ones' effect goes through the later ones.

    All numbers are first-order estimates of the metric's change when a latent, or its influence on another one, is
    taken away; the mean over sequences.
    """

    sites: tuple[str, str]
    """The earlier site and the later one."""
    metric: str
    sources: Tensor
    """(n,) int64, latents at the earlier site, largest effect through the targets first."""
    targets: Tensor
    """(m,) int64, latents at the later site, largest effect first."""
    target_effect: Tensor
    """(m,) float64, effect of each target on the metric."""
    source_effect: Tensor
    """(n,) float64, effect of each source on the metric, by every path."""
    edges: Tensor
    """(n, m) float64, the part of a source's effect that goes through a target."""
    n_sequences: int
    complete: bool = True
    """False when an interrupt ended it early."""
    index: Any = None
    """An index of the latents of each site, by site name; None for bare numbers."""
    origins: tuple[Origin, ...] = ()
    """Which latents the sources and the targets are, by which an index of others is refused."""

    def with_index(self, index: Any) -> Graph:
        """The same graph, with what latents stand for: ``{site: index}``, or the index of one of the sites.

        Raises:
            ConfigError: an index of another SAE or site.
        """
        check_index(index, *self.origins)
        return replace(self, index=index)

    def rows(self, n: int | None = None) -> list[dict[str, Any]]:
        """The strongest n edges, or all, as plain dicts."""
        order = torch.argsort(self.edges.abs().reshape(-1), descending=True, stable=True)[:n].tolist()
        places = [divmod(i, len(self.targets)) for i in order]
        return [
            {"source": int(self.sources[i]), "target": int(self.targets[j]), "edge": float(self.edges[i, j])}
            for i, j in places
        ]

    def plot(self, n: int = 40, index: Any = None) -> Figure:
        """The strongest n edges between the two columns of latents, with their words by an index.

        Raises:
            ConfigError: an index of another SAE or site.
        """
        from saehooks.show.effects import two_columns

        check_index(index, *self.origins)
        known, (early, late) = index or self.index, self.sites
        edges = [
            (labelled(known, early, row["source"]), labelled(known, late, row["target"]), row["edge"])
            for row in self.rows(n)
        ]
        return two_columns(edges, titles=self.sites, title=f"edges: change of {self.metric}")

    def _caption(self) -> str:
        partial = "" if self.complete else "; interrupted, partial"
        text = f"{self.sites[0]} -> {self.sites[1]}: effect on {self.metric}, {self.n_sequences} sequences{partial}"
        return text + survey_note(self.index)

    def _shown(self) -> list[dict[str, Any]]:
        rows = self.rows(SHOWN)
        if self.index is not None:
            for row in rows:
                row["source stands for"] = words_of(self.index, self.sites[0], row["source"])
                row["target stands for"] = words_of(self.index, self.sites[1], row["target"])
        return named(rows, "source", "target")


def latent_graph(
    model: Any,
    saes: Mapping[str, SAE],
    tokens: Any,
    metric: Any = "ce",
    *,
    n_sources: int = 20,
    n_targets: int = 10,
    where: Any = None,
    batch_size: int | None = None,
    run: Callable[[Tensor], Any] | None = None,
    progress: bool | None = None,
    index: Any = None,
    **unknown: Any,
) -> Graph:
    """Find the latents of a later site that matter for a metric, and the latents of an earlier site that feed them.

    An edge is ``-a_i d(sum of g_j a_j)/da_i``: what the metric would change by, to first order, if source i no longer
    reached target j, whose own gradient is g_j. One forward and ``n_targets`` + 2 backward passes for each batch, and
    one forward and backward before them to choose the targets.

    Args:
        model, tokens, metric, where, batch_size, run, progress: as in `rank_latents`.
        saes: two SAEs by site name, the earlier site first.
        n_sources, n_targets: how many latents of each to keep.
        index: ``{site: index of its latents}``, or the index of one of the sites, for words beside the latents.
    Raises:
        ConfigError: not two sites, a metric without a gradient at the clean run, or the later site named first.
    """
    refuse_others(latent_graph, unknown)
    if len(saes) != 2:
        raise ConfigError(f"a graph goes from one site to another: give two SAEs by site name, got {len(saes)}")
    measured = as_metric(metric)
    if measured.flat:
        raise ConfigError(f"the gradient of {measured.name} vanishes at the clean run: take another metric for a graph")
    early, late = saes
    places = {name: Place(model, sae, name, None, where) for name, sae in saes.items()}
    host = places[early].host
    if places[early].site.key == places[late].site.key:
        raise ConfigError(f"a graph goes from one site to another: '{early}' and '{late}' are the same place")
    if isinstance(index, Mapping):
        index = {places[name].site.name if name in places else name: one for name, one in index.items()}
    origins = tuple(place.origin for place in places.values())
    check_index(index, *origins)
    check_metric(places[early], measured)
    warn_in_train_mode(host.model, "drawing a graph of latents")
    data, call = as_data(host, tokens, batch_size), runner(host, run)
    walk = _Walk(places, measured, call, data)
    with bar(progress) as shown:
        targets = walk.targets(n_targets, shown)
        edges, seen = walk.edges(targets, shown)
    sources = edges.abs().sum(1).topk(min(n_sources, int((edges != 0).any(1).sum()))).indices
    return Graph(
        sites=(places[early].site.name, places[late].site.name),
        metric=measured.name,
        sources=sources,
        targets=targets,
        target_effect=walk.effects[late][targets] / data.total,
        source_effect=walk.effects[early][sources] / data.total,
        edges=edges[sources] / seen,
        n_sequences=seen,
        complete=seen == data.total,
        index=index,
        origins=origins,
    )


class _Walk:
    """Forwards with both SAEs attached, and backward passes between them."""

    def __init__(self, places: dict[str, Place], metric: Metric, call: Run, data: Data) -> None:
        self.places, self.metric, self.call, self.data = places, metric, call, data
        self.early, self.late = places
        self.effects = {name: torch.zeros(one.sae.d_sae, dtype=torch.float64) for name, one in places.items()}
        """Sum over sequences of each latent's effect, at the two sites."""

    def targets(self, n: int, shown: Bar) -> Tensor:
        """(n,) int64, the latents of the later site with the largest effect; fills `effects`."""
        shown.start("targets", len(self.data.batches))
        for part in self.data.batches:
            self._add_effects(part)
            shown.step()
        for place in self.places.values():
            place.check_used()
        effect = self.effects[self.late].abs()
        found = effect.topk(min(n, int((effect > 0).sum()))).indices
        if not len(found):
            raise ConfigError(f"no latent at '{self.late}' has an effect on {self.metric.name} in this data")
        return found

    def edges(self, targets: Tensor, shown: Bar) -> tuple[Tensor, int]:
        """(d_sae of the earlier site, targets) float64, and the sequences it sums over: fewer after an interrupt."""
        edges = torch.zeros(self.places[self.early].sae.d_sae, len(targets), dtype=torch.float64)
        seen = 0
        shown.start("edges", len(self.data.batches))
        try:
            with Interruptions() as interruptions:
                for part in self.data.batches:
                    with interruptions.held():
                        edges += self._edges_of(part, targets)
                        seen += len(part.rows)
                    shown.step()
        except KeyboardInterrupt:
            if not seen:
                raise
        return edges, seen

    def _forward(self, part: Inputs) -> tuple[Tensor, dict[str, list[Forward]]]:
        """The metric's sum, and for each site what was recorded each time it fired."""
        with ExitStack() as stack:
            traces = {
                name: stack.enter_context(place.attached(grads=True, rows=part.rows))
                for name, place in self.places.items()
            }
            stack.enter_context(torch.enable_grad())
            output = self.call(part.inputs)
            values = self.metric(output, Batch(part.inputs, part.rows, self.data.total, output.detach()))
        return values.sum(), {name: trace.forwards for name, trace in traces.items()}

    def _add_effects(self, part: Inputs) -> None:
        """Add the effects of a batch at both sites."""
        with frozen(self.places[self.early].host.model):
            total, passes = self._forward(part)
            for name, forwards in passes.items():
                grads = gradient(self.metric.name, total, forwards, keep_graph=name == self.early)
                self.effects[name] += _effects(forwards, grads)

    def _edges_of(self, part: Inputs, targets: Tensor) -> Tensor:
        """(d_sae of the earlier site, targets) float64, summed over the sequences of a batch."""
        with frozen(self.places[self.early].host.model):
            total, passes = self._forward(part)
            early, late = passes[self.early], passes[self.late]
            weighted = [
                (one.codes.with_values(one.codes.values * grad.values).where(one.mask))
                for one, grad in zip(late, gradient(self.metric.name, total, late, keep_graph=True), strict=True)
            ]
            columns = []
            for target in targets.tolist():
                through = torch.stack([codes.values[codes.indices == target].sum() for codes in weighted]).sum()
                if not through.requires_grad:
                    raise ConfigError(f"'{self.late}' does not depend on '{self.early}': give the earlier site first")
                flow = gradient(self.metric.name, through, early, keep_graph=True)
                columns.append(_effects(early, flow))
        return torch.stack(columns, 1)


def _effects(passes: Sequence[Forward], grads: Sequence[Codes]) -> Tensor:
    """(d_sae,) float64, minus value times gradient, summed over the positions where the attachment acts."""
    effect = torch.zeros(grads[0].d_sae, dtype=torch.float64)
    for one, grad in zip(passes, grads, strict=True):
        add_products(effect, one.edited.detach().where(one.mask), grad.where(one.mask), 1.0)
    return effect
