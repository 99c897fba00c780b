"""Activations out of a hooked model: batches of tokens, early-stopped forwards, a shuffle buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saehooks.codes import Codes
from saehooks.errors import ConfigError, NeverFiredError, NotFiniteError, WidthError
from saehooks.sites import Host, Site, host
from saehooks.sites.eager import uncompiled
from saehooks.where import Cursor, Where, as_where, full_mask, positions

AFTER_FIRST = positions(slice(1, None))
"""All positions but the first: an attention sink, whose norm can be a hundred times that of the others."""


class TokenBatches:
    """Text cut into equal sequences of tokens, batch by batch; iterating again gives the same batches.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: one string, or files to read and join.
        context: tokens in a sequence, the leading BOS included.
        batch_size: sequences in a batch.
        limit: stop after about this many tokens.
    Raises:
        ConfigError: the text is too short for one sequence.
    """

    def __init__(
        self,
        tokenizer: Any,
        text: str | Path | Sequence[str | Path],
        *,
        context: int = 256,
        batch_size: int = 8,
        limit: int | None = None,
    ) -> None:
        if context < 2 or batch_size < 1:
            raise ConfigError(f"need context >= 2 and batch_size >= 1, got context={context}, batch_size={batch_size}")
        text = read_text(text)
        if limit is not None:
            text = text[: limit * 8]  # a token is rarely longer than 8 characters on average: enough, and cheap to cut
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
        n = len(ids) // (context - 1)
        if limit is not None:
            n = min(n, max(1, limit // context))
        if n < 1:
            raise ConfigError(f"the text has {len(ids)} tokens, too few for one sequence of {context}")
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        body = ids[: n * (context - 1)].reshape(n, context - 1)
        self.tokens = torch.cat([torch.full((n, 1), bos, dtype=body.dtype), body], dim=1)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tokens.split(self.batch_size))

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.batch_size)

    def __repr__(self) -> str:
        return f"TokenBatches({len(self)} batches, {self.tokens.numel()} tokens in sequences of {self.tokens.shape[1]})"


def read_text(source: str | Path | Sequence[str | Path]) -> str:
    """A string as it is; a Path, or a list of paths, read and joined."""
    if isinstance(source, str):
        return source
    files = [source] if isinstance(source, Path) else [Path(file) for file in source]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"no such text file: {', '.join(missing)}")
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


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


class ShuffleBuffer:
    """Mixes rows from many sequences into training batches, using each row ``passes`` times.

    Once full, it serves a random half of its rows (``passes`` times as many draws when rows are reused) and gives that
    half's places to new rows. With ``passes=1`` every row is served exactly once; with more, that often on average.

    Args:
        capacity: rows held.
        d_in: their width.
        batch_size: rows of a training batch.
        passes: how often a row is used.
        seed: of the order; the same rows and seed give the same batches.
    """

    def __init__(
        self,
        capacity: int,
        d_in: int,
        batch_size: int,
        *,
        passes: int = 1,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if batch_size < 1 or passes < 1 or capacity < 2 * batch_size:
            raise ConfigError(
                f"a buffer needs batch_size >= 1, passes >= 1 and room for two batches, got capacity={capacity}, "
                f"batch_size={batch_size}, passes={passes}"
            )
        self.batch_size, self.passes = batch_size, passes
        self.rows = torch.empty(capacity, d_in, dtype=dtype, device=device)
        self.filled = 0
        """Rows in use, always the first ones."""
        self.generator = torch.Generator().manual_seed(seed)
        self.before_batch: Callable[[], None] | None = None
        """Called before each batch; when it raises, `state` is one from which everything goes on."""
        self._serving: _Serving | None = None
        self._taken = 0
        """Rows held of those that the `add` under way was given."""
        self._held = 0
        """Rows to pass over in the next `add`: a restored buffer holds them already."""

    def add(self, rows: Tensor) -> Iterator[Tensor]:
        """Take in rows (n, d_in); yields the training batches (batch_size, d_in) that become ready.

        Raises:
            WidthError: rows of another width.
            NotFiniteError: NaN or infinity; nothing was taken in.
        """
        if rows.dim() != 2 or rows.shape[1] != self.rows.shape[1]:
            width = self.rows.shape[1]
            raise WidthError(f"the buffer holds rows of width {width}, got a tensor of shape {tuple(rows.shape)}")
        if rows.numel() and not torch.isfinite(rows.sum(dtype=torch.float64)):
            bad = int((~rows.isfinite()).any(1).sum())
            raise NotFiniteError(f"{bad} of {len(rows)} activations hold NaN or infinity")
        self._taken, self._held = self._held, 0
        yield from self._serve()
        while self._taken < len(rows):
            taken = rows[self._taken : self._taken + len(self.rows) - self.filled]
            self.rows[self.filled : self.filled + len(taken)] = taken
            self.filled, self._taken = self.filled + len(taken), self._taken + len(taken)
            if self.filled == len(self.rows):
                yield from self._serve(self.filled // 2)
        self._taken = 0

    def drain(self) -> Iterator[Tensor]:
        """Serve what is left; only a last part smaller than a batch is kept back."""
        yield from self._serve()
        yield from self._serve(self.filled)

    def _serve(self, leaving: int | None = None) -> Iterator[Tensor]:
        """Serve batches in random order; afterwards the first ``leaving`` rows of that order have left.

        Without ``leaving``: go on with the serving that was left half done, if there is one.
        """
        if leaving is not None:
            order = torch.cat([torch.randperm(self.filled, generator=self.generator) for _ in range(self.passes)])
            self._serving = _Serving(order.to(self.rows.device), leaving - leaving % self.batch_size, 0)
        if self._serving is None:
            return
        order, leaving, first = self._serving
        for start in range(first, leaving * self.passes, self.batch_size):
            if self.before_batch is not None:
                self.before_batch()
            self._serving = _Serving(order, leaving, start + self.batch_size)
            yield self.rows[order[start : start + self.batch_size]]
        self._serving = None
        stay = order[leaving : self.filled].sort().values
        # Rows that stay move to the front, in place and in order: a place is never read after it was written.
        for start in range(0, len(stay), 4096):
            part = stay[start : start + 4096]
            self.rows[start : start + len(part)] = self.rows[part]
        self.filled = len(stay)

    def state(self) -> dict[str, Tensor]:
        """Tensors from which `restore` continues bit for bit, also between two batches of an `add`."""
        serving = self._serving or _Serving(torch.zeros(0, dtype=torch.int64), 0, 0)
        return {
            "rows": self.rows[: self.filled].clone(),
            "generator": self.generator.get_state(),
            "order": serving.order,
            "places": torch.tensor([serving.leaving, serving.served, self._taken]),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state`; one from the middle of an `add` wants the same rows in the next `add`."""
        held = state["rows"]
        if held.shape[0] > self.rows.shape[0] or held.shape[1] != self.rows.shape[1]:
            raise WidthError(f"a buffer of {tuple(self.rows.shape)} cannot hold the saved {tuple(held.shape)}")
        self.filled = len(held)
        self.rows[: self.filled] = held
        self.generator.set_state(state["generator"])
        leaving, served, self._taken = state["places"].tolist()
        self._held = self._taken
        order = state["order"].to(self.rows.device)
        self._serving = _Serving(order, leaving, served) if len(order) else None

    def __repr__(self) -> str:
        capacity, width = self.rows.shape
        return f"ShuffleBuffer({self.filled} of {capacity} rows of width {width}, batches of {self.batch_size})"


class _Serving(NamedTuple):
    """A serving that is under way."""

    order: Tensor
    """(filled * passes,) int64, the places of the rows in the order they are drawn."""
    leaving: int
    """So many rows of the first pass leave the buffer when it ends."""
    served: int
    """Draws served already."""
