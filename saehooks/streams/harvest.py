"""Activations out of a hooked model, each forward stopped at the site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from saehooks.codes import Codes
from saehooks.errors import ConfigError, NeverFiredError
from saehooks.hosts import Host, Site, host
from saehooks.hosts.torch_compile import uncompiled
from saehooks.where import Cursor, Where, as_where, full_mask, positions

AFTER_FIRST = positions(slice(1, None))
"""All positions but the first: an attention sink, whose norm can be a hundred times that of the others."""


class Tap:
    """Passes on what flows through one site: the rows of the wanted positions, detached, never a copy of the model's.

    Args:
        where: which positions; all but the first by default.
        receive: called with (n, width) rows at each forward.
    """

    def __init__(self, host: Host, site: Site, receive: Callable[[Tensor], None], where: Any = AFTER_FIRST) -> None:
        self.host, self.site, self.receive = host, site, receive
        self.where: Where | None = None if where is None else as_where(where)
        self.fired = 0

    @contextmanager
    def attached(self) -> Iterator[Tap]:
        """The tap's hooks exist inside the block only."""
        cursor = Cursor()
        with ExitStack() as stack:
            stack.enter_context(uncompiled())
            stack.callback(self.host.watch(cursor.begin).remove)
            stack.callback(self.site.hook(lambda acts: self._take(acts.detach(), cursor)).remove)
            yield self

    def _take(self, acts: Tensor, cursor: Cursor) -> None:
        self.fired += 1
        if self.where is None:
            rows = acts.reshape(-1, acts.shape[-1])
        else:
            # A mask is made from where a forward is, not from codes: there are none yet.
            none = acts.new_zeros(0, dtype=torch.int64)
            offsets = none.new_zeros(acts.shape[0] * acts.shape[1] + 1)
            place = Codes(none, acts.new_zeros(0), offsets, tuple(acts.shape[:2]), 0)
            mask = full_mask(self.where, cursor.look(place, self.host.tokenizer))
            rows = acts[mask]
        self.receive(rows)


def harvest(
    model: Any, batches: Iterable[Any], at: str, *, head: int | None = None, where: Any = AFTER_FIRST
) -> Iterator[Tensor]:
    """Activations of a site, batch by batch, each forward stopped at the site.

    Args:
        model: any model that saehooks knows.
        batches: token tensors (batch, pos), images, or dicts of arguments; moved to the model's device.
        at: the site.
        head: one head of a per-head site.
        where: which positions; all but the first by default, None for all.
    Yields:
        (n, width) rows, in the dtype and on the device of the model. Between two of them the model carries no hook.
    Raises:
        ConfigError: a text instead of batches.
        NeverFiredError: a forward ended without passing the site.
    """
    source = host(model)
    site = source.site(at, head)
    rows: list[Tensor] = []
    tap = Tap(source, site, rows.append, where)
    for batch in checked_batches(batches):
        with tap.attached(), source.stop_at(site), torch.no_grad():
            source.run(source.beside(batch))
        if not rows:
            raise NeverFiredError(f"the forward passed without reaching '{site.name}'; does this batch go through it?")
        yield torch.cat(rows) if len(rows) > 1 else rows[0]
        rows.clear()


def checked_batches(batches: Iterable[Any]) -> Iterable[Any]:
    """The same batches; a text, whose letters would be taken for them, is a ConfigError."""
    if isinstance(batches, (str, bytes)):
        raise ConfigError("batches is one text; write sh.TokenBatches(tokenizer, text), or [text] for a single batch")
    return batches
