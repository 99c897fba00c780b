"""Ranking latents by effect: attribution for all of them, exact ablation for the best."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from saehooks.attachments.resolve import find
from saehooks.causal.ablation import Ablator
from saehooks.causal.attribution import Attribution, attribute
from saehooks.causal.metric import as_metric
from saehooks.causal.progress import bar
from saehooks.causal.ranking import ORDERS, Ranking
from saehooks.causal.runs import DEFAULT, Data, as_data, default_where, runner
from saehooks.edits import latent_list
from saehooks.errors import ConfigError, LatentError
from saehooks.hosts import host as host_of
from saehooks.sae import SAE

STEPS = 8
"""Points of the integrated gradients where they are needed and none was given."""


def rank_latents(
    model: Any,
    sae: SAE,
    tokens: Any,
    metric: Any = "ce",
    *,
    at: str | None = None,
    head: int | None = None,
    where: Any = DEFAULT,
    exact: int | Iterable[int] = 0,
    order: str = "absolute",
    steps: int | None = None,
    latents: Iterable[int] | None = None,
    batch_size: int | None = None,
    run: Callable[[Tensor], Any] | None = None,
    progress: bool | None = None,
) -> Ranking:
    """Rank every active latent by what ablating it does to a metric.

    First by attribution, activation times gradient, one forward and one backward pass for all latents together; then,
    for the best ``exact`` of them, by ablating each exactly. The reconstruction error is kept in both. An interrupt
    (Ctrl-C) returns what was done by then, with ``complete`` False.

    Args:
        model: a TransformerLens model, an open_clip model, or any ``nn.Module``.
        sae: the SAE.
        tokens: (n, pos) tokens; images (n, 3, height, width); texts; or batches of them.
        metric: ``"ce"``, ``"kl"``, ``"cosine"``, one of ``saehooks.causal``, or a function ``(output) -> (batch,)`` or
            ``(output, batch) -> (batch,)``.
        at, head: the site; the SAE's own by default.
        where: the positions in which latents are ablated. By default all but position 0 where the model reads tokens
            (an attention sink), and everywhere for images.
        exact: how many of the best by attribution to ablate exactly; or which latents.
        order: ``"absolute"``, ``"lowering"`` or ``"raising"``: which change of the metric comes first.
        steps: integrated gradients over this many points between all latents ablated and none, at as many passes; by
            default the gradient at the clean run, and 8 points for metrics whose gradient vanishes there.
        latents: rank only these.
        batch_size: sequences in a forward; by default as many as make about 1,024 tokens, or 64 images.
        run: from inputs to output, where the model has to be called in a way of its own.
        progress: a progress bar; by default only in a terminal.
    Returns:
        A `Ranking`: print it, ``.top(20)``, ``.to_pandas()``, ``.plot()``, ``.agreement``.
    Raises:
        ConfigError: empty data, or a metric of the wrong shape or without a gradient.
        NotFiniteError: the metric is NaN or infinite.
        NeverFiredError: no latent is selected in the data.

    Source: attribution patching, Nanda 2023; integrated gradients, arXiv 1703.01365; both on SAE latents as in
    arXiv 2403.19647.
    """
    if order not in ORDERS:
        raise ConfigError(f"order={order!r}; expected one of {', '.join(map(repr, ORDERS))}")
    if steps is not None and steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    host, measured = host_of(model), as_metric(metric)
    site = find(host, sae, at, head)
    data, call = as_data(host, tokens, batch_size), runner(host, run)
    place = {"at": site.given, "head": site.head, "where": default_where(host, site, where)}
    steps = STEPS if steps is None and measured.flat else steps
    with bar(progress) as shown:
        sums, complete = attribute(model, sae, data, measured, call, place, steps, shown)
        candidates = _candidates(sae, sums, latents)
        measure = Ablator(host, site, sae, measured, call, place, batch_size=batch_size)
        chosen = _chosen(exact, candidates, sums.mean_effect[candidates], order, sae) if complete else candidates[:0]
        exactly, finished = _exact(measure, data, chosen, sae.d_sae, shown)
    best = _best_first(candidates, sums.mean_effect[candidates], exactly[candidates], order)
    return Ranking(
        site=site.name,
        metric=measured.name,
        order=order,
        method="gradient x activation" if steps is None else f"integrated gradients, {steps} points",
        clean=sums.clean / sums.seen,
        n_sequences=sums.seen,
        latents=best,
        attribution=sums.mean_effect[best],
        exact=exactly[best],
        tokens=sums.tokens[best],
        sequences=sums.sequences[best],
        mean_value=sums.mean_value[best],
        complete=complete and finished,
        cost=_cost(sums.seen, steps, measure),
    )


def _candidates(sae: SAE, sums: Attribution, latents: Iterable[int] | None) -> Tensor:
    """(n,) int64, the latents to rank."""
    if latents is None:
        return sums.tokens.nonzero()[:, 0]
    asked = torch.tensor(sorted(latent_list(latents)), dtype=torch.int64)
    check_latents(sae, asked.tolist())
    silent = asked[sums.tokens[asked] == 0].tolist()
    if silent:
        names = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
        warnings.warn(f"{len(silent)} latents never fire in this data, so their effect is 0: {names}", stacklevel=3)
    return asked


def check_latents(sae: SAE, latents: Iterable[int]) -> None:
    """Raise LatentError unless every latent lies in ``0 .. d_sae - 1``."""
    for latent in latents:
        if not 0 <= latent < sae.d_sae:
            raise LatentError(f"latent {latent} is out of range: this SAE has latents 0 to {sae.d_sae - 1}")


def _chosen(exact: Any, candidates: Tensor, estimate: Tensor, order: str, sae: SAE) -> Tensor:
    """(n,) int64, the latents to ablate exactly."""
    if not isinstance(exact, int):
        asked = torch.tensor(latent_list(exact), dtype=torch.int64)
        check_latents(sae, asked.tolist())
        return asked[torch.isin(asked, candidates)]
    if exact < 0:
        raise ConfigError(f"exact must be a number of latents or a list of them, got {exact}")
    return candidates[torch.argsort(_key(estimate, order), descending=True, stable=True)[:exact]]


def _exact(measure: Ablator, data: Data, chosen: Tensor, d_sae: int, shown: Any) -> tuple[Tensor, bool]:
    """(d_sae,) float64 exact effects, NaN where none was measured; and whether all of the data went in."""
    exactly = torch.full((d_sae,), torch.nan, dtype=torch.float64)
    if not len(chosen):
        return exactly, True
    table = torch.zeros(len(chosen), d_sae, dtype=torch.bool)
    table[torch.arange(len(chosen)), chosen] = True
    try:
        found = measure(data, table, shown)
    except KeyboardInterrupt:  # before the first batch was done: the attribution is kept
        return exactly, False
    exactly[chosen] = found.change[:, found.done].mean(1)
    return exactly, bool(found.done.all())


def _best_first(candidates: Tensor, estimate: Tensor, exact: Tensor, order: str) -> Tensor:
    """(n,) int64, the candidates: those measured exactly by that effect, and after them the others by the estimate."""
    unmeasured = exact.isnan()
    best = torch.argsort(_key(torch.where(unmeasured, estimate, exact), order), descending=True, stable=True)
    return candidates[best[torch.argsort(unmeasured[best].int(), stable=True)]]


def _key(effect: Tensor, order: str) -> Tensor:
    """What to sort by, largest first."""
    return {"absolute": effect.abs(), "lowering": -effect, "raising": effect}[order]


def _cost(seen: int, steps: int | None, measure: Ablator) -> dict[str, float]:
    """Sequences that went forward and backward; on a path of several points the clean run needs no backward pass."""
    return {
        "sequences_forward": seen * (1 + (steps or 0)),
        "sequences_backward": seen * (steps or 1),
        "sequences_ablated": measure.rows_run,
        "resumed_at_site": float(measure.resume and bool(measure.rows_run)),
    }
