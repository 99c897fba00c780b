"""A tap: takes the activations of a site out of a hooked model, each forward stopped at the site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from saehooks.errors import ConfigError, NeverFiredError, SaehooksError
from saehooks.hosts import Host, Site, host
from saehooks.hosts.base import is_tokens
from saehooks.hosts.sequences import SequenceWatch
from saehooks.hosts.torch_compile import uncompiled
from saehooks.hosts.train_mode import warn_in_train_mode
from saehooks.where import View, as_where, full_mask, past_first

ACTIVATIONS = "to train on activations of your own leave the model out: sh.fit(activations, sae)"


class Tap:
    """Passes on what flows through one site: the rows of the wanted positions, detached, never a copy of the model's.

    Args:
        where: which positions; all but the first of each text by default. Never padding.
        receive: called with (n, width) rows at each forward.
    """

    def __init__(self, host: Host, site: Site, receive: Callable[[Tensor], None], where: Any = None) -> None:
        self.host, self.site, self.receive = host, site, receive
        self.where = past_first if where is None else as_where(where)
        self.fired = 0

    @contextmanager
    def attached(self) -> Iterator[Tap]:
        """The tap's hooks exist inside the block only."""
        watch = SequenceWatch(self.host)
        with uncompiled(), watch.watching([(self.site, lambda acts: self._take(acts.detach(), watch))]):
            yield self

    def _take(self, acts: Tensor, watch: SequenceWatch) -> None:
        columns = watch.look(self.site, acts)
        if columns.again:
            return  # the same forward, run again to compute gradients
        self.fired += 1
        acts = columns.arrange(acts)
        mask = full_mask(self.where, View.without_codes(columns, acts, self.host.tokenizer))
        self.receive(acts.reshape(-1, acts.shape[-1]) if mask is None else acts[mask])


def batch_by_batch(
    model: Any, batches: Iterable[Any], at: str, *, head: int | None = None, where: Any = None
) -> Iterator[Tensor]:
    """Activations (n, width) of a site, batch by batch, each forward stopped at the site: see `saehooks.harvest`."""
    source = host(model)
    site = source.site(at, head)
    for (rows,) in harvest_sites(source, checked_batches(batches), [(site, where)]):
        yield rows


def harvest_sites(source: Host, batches: Iterable[Any], wanted: Sequence[tuple[Site, Any]]) -> Iterator[list[Tensor]]:
    """Activations of several sites, batch by batch, each forward stopped at the last of them.

    Args:
        source: the model.
        batches: as for `saehooks.harvest`.
        wanted: sites, each with its rule of positions.
    Yields:
        (n, width) rows of each, in the order given. Between two of them the model carries no hook.
    """
    warn_in_train_mode(source.model, "taking activations", stacklevel=4)
    rows: list[list[Tensor]] = [[] for _ in wanted]
    taps = [Tap(source, site, found.append, where) for found, (site, where) in zip(rows, wanted, strict=True)]
    sites = {site.key: site for site, _ in wanted}
    last = next(iter(sites.values())) if len(sites) == 1 else None
    for batch in batches:
        if last is None:
            last = _last_reached(source, batch, list(sites.values()))
        with ExitStack() as stack:
            for tap in taps:
                stack.enter_context(tap.attached())
            stack.enter_context(source.stop_at(last))
            stack.enter_context(torch.no_grad())
            _run(source, batch)
        for (site, _), parts in zip(wanted, rows, strict=True):
            if not parts:
                raise NeverFiredError(
                    f"the forward passed without reaching '{site.name}'; does this batch go through it?"
                )
        yield [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in rows]
        for parts in rows:
            parts.clear()


def _last_reached(source: Host, batch: Any, sites: list[Site]) -> Site:
    """Of several sites the one that a forward reaches last, found by one forward that runs to its end."""
    reached: list[Site] = []
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for site in sites:
            stack.callback(site.hook(lambda acts, site=site: reached.append(site)).remove)  # type: ignore[misc]
        stack.enter_context(torch.no_grad())
        _run(source, batch)
    firsts = list(dict.fromkeys(reached))
    return firsts[-1] if firsts else sites[-1]


def _run(source: Host, batch: Any) -> None:
    try:
        source.run(source.to_device(batch))
    except SaehooksError:
        raise
    except IndexError as error:
        tokens = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if isinstance(tokens, Tensor) and is_tokens(tokens):
            raise ConfigError(
                f"the largest token is {int(tokens.max())}, which the model does not know ({error}): are these tokens "
                "of another model's tokenizer?"
            ) from error
        raise
    except Exception as error:
        if isinstance(batch, Tensor) and batch.dim() == 2 and batch.is_floating_point():
            raise ConfigError(
                f"the model does not take a batch of shape {tuple(batch.shape)} in {batch.dtype} ({error}). If these "
                f"are activations of your own, {ACTIVATIONS}"
            ) from error
        raise


def checked_batches(batches: Iterable[Any]) -> Iterable[Any]:
    """The same batches, or the one that a mapping is; what would be iterated by mistake (one text, activations, a model
    or an SAE) is a ConfigError."""
    if isinstance(batches, Mapping):  # what a tokenizer returns
        return [batches]
    if isinstance(batches, Module) or not isinstance(batches, Iterable):
        raise ConfigError(f"expected batches of the model's inputs, got {type(batches).__name__}")
    if isinstance(batches, (str, bytes)):
        raise ConfigError("batches is one text; write sh.TokenBatches(tokenizer, text), or [text] for a single batch")
    if isinstance(batches, Tensor) and batches.dim() == 2 and batches.is_floating_point():
        raise ConfigError(f"batches is {batches.dtype} of shape {tuple(batches.shape)}: activations? {ACTIVATIONS}")
    return batches
