"""Gradients of tables that are not written: kept as the sparse sums they are, for an optimiser that takes them so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor


class Contribution(NamedTuple):
    """One sparse sum of a table's gradient: row ``i`` gets ``value * left[row]`` of the entries with index ``i``."""

    values: Tensor
    indices: Tensor
    offsets: Tensor
    left: Tensor


class Deferred:
    """Contributions by table, in the order in which the backward pass met them."""

    def __init__(self, tables: Iterable[Tensor]) -> None:
        self._found: dict[int, list[Contribution]] = {table.data_ptr(): [] for table in tables}

    def take(self, table: Tensor, contribution: Contribution) -> bool:
        """Keep a contribution if the table's gradient is deferred."""
        found = self._found.get(table.data_ptr())
        if found is not None:
            found.append(contribution)
        return found is not None

    def pop(self, table: Tensor) -> list[Contribution]:
        """The contributions of a table, which are forgotten."""
        found = self._found.get(table.data_ptr(), [])
        taken, found[:] = list(found), []
        return taken


_active: list[Deferred] = []


@contextmanager
def deferring(deferred: Deferred) -> Iterator[None]:
    """Inside the block, backward passes keep the gradients of these tables as sparse sums."""
    _active.append(deferred)
    try:
        yield
    finally:
        _active.pop()


def take(table: Tensor, values: Tensor, indices: Tensor, offsets: Tensor, left: Tensor) -> bool:
    """Keep a contribution to a table's gradient, if someone asked for it unwritten."""
    return bool(_active) and _active[-1].take(table, Contribution(values, indices, offsets, left))
