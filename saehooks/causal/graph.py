"""Edges between latents of two SAEs: a small attribution graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehooks.attachments import attach
from saehooks.causal.attribution import gradient
from saehooks.causal.metric import Batch, Metric, as_metric
from saehooks.causal.progress import Bar, bar
from saehooks.causal.runs import DEFAULT, Data, Inputs, as_data, default_where, runner
from saehooks.causal.table import SHOWN, Table, named
from saehooks.errors import ConfigError
from saehooks.hosts import host as host_of
from saehooks.hosts.frozen import frozen
from saehooks.sae import SAE
from saehooks.trace import Forward

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Graph(Table):
    """Latents of two sites and how much the earlier ones do through the later ones.

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

    def rows(self, n: int | None = None) -> list[dict[str, Any]]:
        """The strongest n edges, or all, as plain dicts."""
        order = torch.argsort(self.edges.abs().reshape(-1), descending=True, stable=True)[:n].tolist()
        places = [divmod(i, len(self.targets)) for i in order]
        return [
            {"source": int(self.sources[i]), "target": int(self.targets[j]), "edge": float(self.edges[i, j])}
            for i, j in places
        ]

    def plot(self, n: int = 40) -> Figure:
        """The strongest n edges between the two columns of latents."""
        from saehooks.show.effects import two_columns

        edges = [(row["source"], row["target"], row["edge"]) for row in self.rows(n)]
        return two_columns(edges, titles=self.sites, title=f"edges: change of {self.metric}")

    def _caption(self) -> str:
        partial = "" if self.complete else "; interrupted, partial"
        return f"{self.sites[0]} -> {self.sites[1]}: effect on {self.metric}, {self.n_sequences} sequences{partial}"

    def _shown(self) -> list[dict[str, Any]]:
        return named(self.rows(SHOWN), "source", "target")


def latent_graph(
    model: Any,
    saes: Mapping[str, SAE],
    tokens: Any,
    metric: Any = "ce",
    *,
    n_sources: int = 20,
    n_targets: int = 10,
    where: Any = DEFAULT,
    batch_size: int | None = None,
    run: Callable[[Tensor], Any] | None = None,
    progress: bool | None = None,
) -> Graph:
    """Find the latents of a later site that matter for a metric, and the latents of an earlier site that feed them.

    An edge is ``-a_i d(sum of g_j a_j)/da_i``: what the metric would change by, to first order, if source i no longer
    reached target j, whose own gradient is g_j. One forward and ``n_targets`` + 2 backward passes for each batch, and
    one forward and backward before them to choose the targets.

    Args:
        model, tokens, metric, where, batch_size, run, progress: as in `rank_latents`.
        saes: two SAEs by site name, the earlier site first.
        n_sources, n_targets: how many latents of each to keep.
    Raises:
        ConfigError: not two sites, a metric without a gradient at the clean run, or the later site named first.
    """
    if len(saes) != 2:
        raise ConfigError(f"a graph goes from one site to another: give two SAEs by site name, got {len(saes)}")
    measured, host = as_metric(metric), host_of(model)
    if measured.flat:
        raise ConfigError(f"the gradient of {measured.name} vanishes at the clean run: take another metric for a graph")
    early, late = saes
    data, call = as_data(host, tokens, batch_size), runner(host, run)
    rule = {name: default_where(host, host.site(name), where) for name in saes}
    walk = _Walk(model, saes, measured, call, rule, data)
    with bar(progress) as shown:
        targets = walk.targets(n_targets, shown)
        edges, seen = walk.edges(targets, shown)
    sources = edges.abs().sum(1).topk(min(n_sources, int((edges != 0).any(1).sum()))).indices
    return Graph(
        sites=(early, late),
        metric=measured.name,
        sources=sources,
        targets=targets,
        target_effect=walk.effects[late][targets] / data.total,
        source_effect=walk.effects[early][sources] / data.total,
        edges=edges[sources] / seen,
        n_sequences=seen,
        complete=seen == data.total,
    )


class _Walk:
    """Forwards with both SAEs attached, and backward passes between them."""

    def __init__(
        self,
        model: Any,
        saes: Mapping[str, SAE],
        metric: Metric,
        call: Callable[[Tensor], Tensor],
        rule: dict[str, Any],
        data: Data,
    ) -> None:
        self.model, self.saes, self.metric, self.call, self.rule, self.data = model, saes, metric, call, rule, data
        self.early, self.late = saes
        self.effects = {name: torch.zeros(sae.d_sae, dtype=torch.float64) for name, sae in saes.items()}
        """Sum over sequences of each latent's effect, at the two sites."""

    def targets(self, n: int, shown: Bar) -> Tensor:
        """(n,) int64, the latents of the later site with the largest effect; fills `effects`."""
        shown.start("targets", len(self.data.batches))
        for part in self.data.batches:
            self._add_effects(part)
            shown.step()
        effect = self.effects[self.late].abs()
        found = effect.topk(min(n, int((effect > 0).sum()))).indices
        if not len(found):
            raise ConfigError(f"no latent at '{self.late}' has an effect on {self.metric.name} in this data")
        return found

    def edges(self, targets: Tensor, shown: Bar) -> tuple[Tensor, int]:
        """(d_sae of the earlier site, targets) float64, and the sequences it sums over: fewer after an interrupt."""
        edges = torch.zeros(self.saes[self.early].d_sae, len(targets), dtype=torch.float64)
        seen = 0
        shown.start("edges", len(self.data.batches))
        try:
            for part in self.data.batches:
                edges += self._edges_of(part, targets)
                seen += len(part.rows)
                shown.step()
        except KeyboardInterrupt:
            if not seen:
                raise
        return edges, seen

    def _forward(self, part: Inputs) -> tuple[Tensor, dict[str, Forward]]:
        with attach(self.model, dict(self.saes), where=self.rule, grads=True) as traces, torch.enable_grad():
            output = self.call(part.inputs)
            values = self.metric(output, Batch(part.inputs, part.rows, self.data.total, output.detach()))
        return values.sum(), {name: traces[name] for name in self.saes}

    def _add_effects(self, part: Inputs) -> None:
        """Add the effects of a batch at both sites."""
        with frozen(self.model):
            total, traces = self._forward(part)
            for name, trace in traces.items():
                grads = gradient(self.metric.name, total, trace, keep_graph=name == self.early)
                self.effects[name] += _summed(trace, -(grads.values * trace.edited.values.detach()))

    def _edges_of(self, part: Inputs, targets: Tensor) -> Tensor:
        """(d_sae of the earlier site, targets) float64, summed over the sequences of a batch."""
        with frozen(self.model):
            total, traces = self._forward(part)
            early, late = traces[self.early], traces[self.late]
            grads = gradient(self.metric.name, total, late, keep_graph=True)
            columns = []
            inside = _inside(late)
            for target in targets.tolist():
                chosen = inside & (late.codes.indices == target)
                through = (late.codes.values[chosen] * grads.values[chosen]).sum()
                if not through.requires_grad:
                    raise ConfigError(f"'{self.late}' does not depend on '{self.early}': give the earlier site first")
                flow = gradient(self.metric.name, through, early, keep_graph=True)
                columns.append(_summed(early, -(flow.values * early.edited.values.detach())))
        return torch.stack(columns, 1)


def _inside(trace: Forward) -> Tensor:
    """(nnz,) bool, the entries at positions where the attachment acts."""
    codes = trace.codes
    if trace.mask is None:
        return torch.ones_like(codes.indices, dtype=torch.bool)
    return trace.mask.reshape(-1).to(codes.indices.device)[codes.rows]


def _summed(trace: Forward, terms: Tensor) -> Tensor:
    """(d_sae,) float64, the sum of entries over the positions where the attachment acts."""
    inside, codes = _inside(trace), trace.codes
    out = torch.zeros(codes.d_sae, dtype=torch.float64)
    return out.index_add_(0, codes.indices[inside].cpu(), terms[inside].double().cpu())
