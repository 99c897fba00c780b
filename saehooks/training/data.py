"""What a training reads: rows of activations, batch by batch, from a model's sites or of the user's own."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from saehooks.errors import ConfigError, WidthError
from saehooks.hosts import Host, Site
from saehooks.ranks import Alone
from saehooks.streams import Fingerprint, Mark, harvest_sites, identity_of, position_of, unseen

ROWS = 8192
"""Rows of a tensor of activations that are taken in at once."""


class Part(NamedTuple):
    """What one batch gives."""

    number: int
    """How many batches came before it."""
    batch: Any
    """What was read: it decides the fingerprint of the data."""
    rows: Mapping[Hashable, Tensor]
    """(n, d_in) activations of each site, by its key."""
    position: list | None = None
    """Where the batch begins in its source, if the source says."""


class Data(Protocol):
    """Rows for one training, or for several that read the same batches."""

    def __len__(self) -> int:
        """How many batches there are.

        Raises:
            TypeError: the batches have no length.
        """

    @property
    def identity(self) -> str:
        """See `saehooks.streams.seen.identity_of`."""

    def parts(self, marks: Iterable[Mark]) -> Iterator[Part]:
        """The parts from the first batch on that a training has not seen.

        Args:
            marks: how far each training has read.
        Raises:
            ConfigError: the batches seen do not come again.
        """


class ModelData:
    """Activations of sites, each forward stopped at the last of them.

    Args:
        source: the model.
        batches: its inputs.
        sites: each with its rule of positions, by the key under which a `Part` holds its rows.
        ranks: processes that share the forwards: each runs every so many-th batch, and all get the rows of all.
    """

    def __init__(
        self,
        source: Host,
        batches: Iterable[Any],
        sites: Mapping[Hashable, tuple[Site, Any]],
        ranks: Alone | None = None,
    ) -> None:
        self._source, self._batches, self._sites, self._ranks = source, batches, sites, ranks or Alone()

    def __len__(self) -> int:
        return _length(self._batches)

    @property
    def identity(self) -> str:
        return identity_of(self._batches)

    def _parts_of_all(self, marks: Iterable[Mark]) -> Iterator[Part]:
        """Each rank runs one batch of a group and sends its rows to the others."""
        sites, ranks = self._sites, self._ranks
        groups = _groups(ranks.size, unseen(self._batches, marks))

        def read() -> tuple[list[tuple[int, Any]], Sequence[Tensor | None]]:
            group = next(groups, [])
            if ranks.rank >= len(group):
                return group, [None] * len(sites)
            return group, next(harvest_sites(self._source, [group[ranks.rank][1]], list(sites.values())))

        while True:
            group, rows = ranks.agree(read)
            _check_same_data(ranks, [batch for _, batch in group])
            if not group:
                return
            found = [ranks.exchange(one) for one in rows]  # by site, then by rank
            for rank, (number, batch) in enumerate(group):
                own = {key: one for key, each in zip(sites, found, strict=True) if (one := each[rank]) is not None}
                yield Part(number, batch, own, position_of(self._batches, number))

    def parts(self, marks: Iterable[Mark]) -> Iterator[Part]:
        if self._ranks.size > 1:
            yield from self._parts_of_all(marks)
            return
        current: list[tuple[int, Any]] = []

        def noted() -> Iterator[Any]:
            for count, batch in unseen(self._batches, marks):
                current[:] = [(count, batch)]
                yield batch

        for rows in harvest_sites(self._source, noted(), list(self._sites.values())):
            number, batch = current[0]
            yield Part(number, batch, dict(zip(self._sites, rows, strict=True)), position_of(self._batches, number))


class OwnData:
    """Activations of one's own: a tensor (n, d_in), or an iterable of such tensors that can be iterated again."""

    def __init__(self, activations: Tensor | Iterable[Tensor], d_in: int, ranks: Alone | None = None) -> None:
        self._activations, self._d_in, self._ranks = activations, d_in, ranks or Alone()
        if isinstance(activations, Tensor):
            self._check(activations)
            self._activations = activations.split(ROWS)
        width = getattr(activations, "d_in", d_in)
        if width != d_in:
            raise WidthError(f"the SAE reads activations of width {d_in}, these are {width} wide")

    def __len__(self) -> int:
        return _length(self._activations)

    @property
    def identity(self) -> str:
        return identity_of(self._activations)

    def parts(self, marks: Iterable[Mark]) -> Iterator[Part]:
        parts, ranks = self._parts(marks), self._ranks
        if ranks.size == 1:
            yield from parts
            return
        while True:
            part = ranks.agree(lambda: next(parts, None))
            _check_same_data(ranks, [] if part is None else [part.batch])
            if part is None:
                return
            yield part

    def _parts(self, marks: Iterable[Mark]) -> Iterator[Part]:
        for count, rows in unseen(self._activations, marks):
            self._check(rows)
            yield Part(count, rows, {None: rows})

    def _check(self, rows: Any) -> None:
        shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        if not isinstance(rows, Tensor) or rows.dim() != 2 or not rows.is_floating_point():
            raise ConfigError(f"activations are float tensors (n, {self._d_in}), got {shape}: acts.flatten(0, -2)")
        if rows.shape[1] != self._d_in:
            raise WidthError(f"the SAE reads activations of width {self._d_in}, got rows of width {rows.shape[1]}")


def is_activations(given: Any) -> bool:
    """Whether what was given in a model's place is activations: a tensor, several, or a source that says so."""
    if isinstance(given, (list, tuple)):
        return bool(given) and all(isinstance(one, Tensor) for one in given)
    return isinstance(given, Tensor) or getattr(given, "holds_activations", False)


def _check_same_data(ranks: Alone, batches: list[Any]) -> None:
    """Every rank reads the same batches.

    Raises:
        ConfigError: on every rank: some have others, or more of them.
    """
    content = Fingerprint()
    for batch in batches:
        content.add(batch)
    ranks.check_agreement({"batches": len(batches), "content of the batches": content.value})


def _groups(size: int, batches: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """Batches by so many; the last group may be smaller."""
    while group := list(islice(batches, size)):
        yield group


def _length(batches: Any) -> int:
    if not isinstance(batches, Sized):
        raise TypeError("the batches have no length")
    return len(batches)  # of a DataLoader over a stream, a TypeError
