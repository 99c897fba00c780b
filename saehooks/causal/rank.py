"""Ranking latents by effect: attribution for all of them, exact ablation for the best."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from saehooks.attachments.request import refuse_others
from saehooks.causal.ablation import Ablator
from saehooks.causal.attribution import Attribution, attribute
from saehooks.causal.metric import as_metric
from saehooks.causal.ranking import ORDERS, Ranking
from saehooks.causal.runs import Data, Place, as_data, check_metric, runner
from saehooks.causal.words import check_index
from saehooks.edits import latent_list
from saehooks.errors import ConfigError, LatentError
from saehooks.hosts.train_mode import warn_in_train_mode
from saehooks.sae import SAE
from saehooks.show.progress import bar

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
    where: Any = None,
    exact: int | Iterable[int] = 0,
    order: str = "absolute",
    steps: int | None = None,
    latents: Iterable[int] | None = None,
    batch_size: int | None = None,
    run: Callable[[Tensor], Any] | None = None,
    progress: bool | None = None,
    index: Any = None,
    **unknown: Any,
) -> Ranking:
    """Rank every active latent by what ablating it does to a metric.

    First by attribution, activation times gradient, one forward and one backward pass for all latents together; then,
    for the best ``exact`` of them, by ablating each exactly. The reconstruction error is kept in both. An interrupt
    (Ctrl-C) returns what was done by then, with ``complete`` False.

    Args:
        model: a TransformerLens model, an open_clip model, or any ``nn.Module``.
        sae: the SAE.
        tokens: (n, pos) tokens; images (n, 3, height, width); texts; what a tokenizer returns, whose padding is left
            out; or batches of them.
        metric: ``"ce"``, ``"kl"``, ``"cosine"``, one of ``saehooks.causal``, or a function ``(output) -> (batch,)`` or
            ``(output, batch) -> (batch,)``.
        at, head: the site; the SAE's own by default.
        where: the positions in which latents are ablated; left out, where the SAE was trained. Never padding.
        exact: how many of the best by attribution to ablate exactly; or which latents.
        order: ``"absolute"``, ``"lowering"`` or ``"raising"``: which change of the metric comes first.
        steps: integrated gradients over this many points between all latents ablated and none, at as many passes; by
            default the gradient at the clean run, and 8 points for metrics whose gradient vanishes there.
        latents: rank only these.
        batch_size: sequences in a forward; by default as many as make about 1,024 tokens, or 64 images.
        run: from inputs to output, where the model has to be called in a way of its own.
        progress: a progress bar; by default only in a terminal.
        index: a `saehooks.LatentIndex` of this site, whose words stand beside the latents.
    Returns:
        A `Ranking`: print it, ``.top(20)``, ``.to_pandas()``, ``.plot()``, ``.agreement``.
    Raises:
        ConfigError: empty data, a metric of the wrong shape or without a gradient, or an index of another SAE.
        NotFiniteError: the metric is NaN or infinite.
        NeverFiredError: no latent is selected in the data.

    Source: attribution patching, Nanda 2023; integrated gradients, arXiv 1703.01365; both on SAE latents as in
    arXiv 2403.19647.
    """
    refuse_others(rank_latents, unknown)
    if order not in ORDERS:
        raise ConfigError(f"order={order!r}; expected one of {', '.join(map(repr, ORDERS))}")
    if steps is not None and steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    count, listed = _exact_as_asked(exact, sae)
    wanted = None if latents is None else _listed(latents, sae)
    place, measured = Place(model, sae, at, head, where), as_metric(metric)
    origin = place.origin
    check_index(index, origin)
    check_metric(place, measured)
    warn_in_train_mode(place.host.model, "ranking latents")
    data, call = as_data(place.host, tokens, batch_size), runner(place.host, run)
    steps = STEPS if steps is None and measured.flat else steps
    with bar(progress) as shown:
        sums, complete = attribute(place, data, measured, call, steps, shown)
        candidates = _candidates(sums, wanted)
        measure = Ablator(place, measured, call, batch_size=batch_size)
        chosen = _chosen(count, listed, candidates, sums.mean_effect[candidates], order)
        chosen = chosen if complete else chosen[:0]
        exactly, finished = _exact(measure, data, chosen, sae.d_sae, shown)
    best = _best_first(candidates, sums.mean_effect[candidates], exactly[candidates], order)
    return Ranking(
        site=place.site.name,
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
        index=index,
        head=origin.head,
        fingerprint=origin.fingerprint,
    )


def _candidates(sums: Attribution, asked: Tensor | None) -> Tensor:
    """(n,) int64, the latents to rank, ascending."""
    if asked is None:
        return sums.tokens.nonzero()[:, 0]
    silent = asked[sums.tokens[asked] == 0].tolist()
    if silent:
        names = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
        warnings.warn(f"{len(silent)} latents never fire in this data, so their effect is 0: {names}", stacklevel=3)
    return asked


def _listed(latents: Any, sae: SAE) -> Tensor:
    """(n,) int64, latents as they were asked for, ascending."""
    asked = sorted(latent_list(latents))
    check_latents(sae, asked)
    return torch.tensor(asked, dtype=torch.int64)


def check_latents(sae: SAE, latents: Iterable[int]) -> None:
    """Raise LatentError unless every latent lies in ``0 .. d_sae - 1``."""
    for latent in latents:
        if not 0 <= latent < sae.d_sae:
            raise LatentError(f"latent {latent} is out of range: this SAE has latents 0 to {sae.d_sae - 1}")


def _exact_as_asked(exact: Any, sae: SAE) -> tuple[int, Tensor | None]:
    """What ``exact=`` means: how many of the best, or which latents."""
    axes: int = getattr(exact, "ndim", 0)
    if axes or not hasattr(exact, "__index__"):
        return 0, _listed(exact, sae)
    count = exact.__index__()  # of Python, numpy or torch
    if count < 0:
        raise ConfigError(f"exact must be a number of latents or a list of them, got {exact}")
    return count, None


def _chosen(count: int, listed: Tensor | None, candidates: Tensor, estimate: Tensor, order: str) -> Tensor:
    """(n,) int64, the latents to ablate exactly."""
    if listed is not None:
        return listed[torch.isin(listed, candidates)]
    return candidates[torch.argsort(_key(estimate, order), descending=True, stable=True)[:count]]


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
