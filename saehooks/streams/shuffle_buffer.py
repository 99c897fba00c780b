"""Rows of many sequences, mixed into training batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from saehooks.errors import ConfigError, NotFiniteError, WidthError
from saehooks.precision import widest


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
        self.generator = torch.Generator(device="cpu").manual_seed(seed)
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
        if rows.numel() and not torch.isfinite(rows.sum(dtype=widest(rows.device))):
            bad = int((~rows.isfinite()).any(1).sum())
            raise NotFiniteError(f"{bad} of {len(rows)} activations hold NaN or infinity")
        if self._held > len(rows):
            raise ConfigError(
                f"the buffer goes on amid {self._held} rows or more, got {len(rows)}: other rows than before"
            )
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
        """Serve what is left as batches (batch_size, d_in); a last part smaller than a batch is kept back."""
        yield from self._serve()
        yield from self._serve(self.filled)

    def _serve(self, leaving: int | None = None) -> Iterator[Tensor]:
        """Serve batches in random order; afterwards the first ``leaving`` rows of that order have left.

        Without ``leaving``: go on with the serving that was left half done, if there is one.
        """
        if leaving is not None:
            order = torch.cat([self._shuffled(self.filled) for _ in range(self.passes)])
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

    def _shuffled(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator, device="cpu")

    @property
    def under_way(self) -> int:
        """Rows taken in of those that an unfinished `add` was given; such rows come again after a `restore`."""
        return self._taken

    def state(self) -> dict[str, Tensor]:
        """Tensors, rows (n, d_in) among them, from which `restore` continues bit for bit, also amid an `add`."""
        serving = self._serving or _Serving(torch.zeros(0, dtype=torch.int64, device="cpu"), 0, 0)
        return {
            "rows": self.rows[: self.filled].clone(),
            "generator": self.generator.get_state(),
            "order": serving.order,
            "places": torch.tensor([serving.leaving, serving.served, self._taken], dtype=torch.int64, device="cpu"),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state`; one from the middle of an `add` wants the same rows (n, d_in) in the next `add`."""
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
