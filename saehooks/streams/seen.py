"""Going on in data where an earlier process stopped, and knowing it again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from saehooks.errors import ConfigError
from saehooks.streams.fingerprint import Fingerprint


class Mark(NamedTuple):
    """How far a reader has read."""

    number: int = 0
    """Batches seen."""
    value: int = 0
    """Fingerprint of all of them."""
    last: int = 0
    """Fingerprint of the last of them alone."""
    source: str = ""
    """What they came from, by `identity_of`."""
    position: list | None = None
    """Where the last of them begins, in a source that says."""


def identity_of(batches: Any) -> str:
    """What tells a source that can be entered anywhere (it has ``from_batch``) from others; "" for other batches."""
    return str(batches.identity) if hasattr(batches, "from_batch") else ""


def unseen(batches: Iterable[Any], marks: Iterable[Mark]) -> Iterator[tuple[int, Any]]:
    """The batches that at least one reader has not seen, each with how many came before it.

    Batches seen before are read again and compared by their fingerprint; of a source with ``from_batch`` only the last
    one is, and the source's identity.

    Args:
        batches: those of the first run.
        marks: of every reader.
    Raises:
        ConfigError: they are others, in another order, or fewer than were seen.
    """
    left = {mark.number: mark for mark in marks}
    whole = not hasattr(batches, "from_batch")
    first = min(left)
    if not whole:
        _check_source(identity_of(batches), left.values())
    count = 0 if whole else max(0, first - 1)
    again = Fingerprint()
    for batch in batches if whole else _entered(batches, count, left[first]):
        _check(left, count, again, whole)
        if left:
            again.add(batch)
        if count >= first:
            yield count, batch
        count += 1
    _check(left, count, again, whole)
    if left:
        raise ConfigError(
            f"there are {count} batches, but {max(left)} were seen before: to go on, give the batches of the first run"
        )


def _entered(batches: Any, number: int, mark: Mark) -> Iterator[Any]:
    """The batches of a source from one on, from where a mark says that it begins."""
    return batches.from_batch(number, mark.position) if hasattr(batches, "position_of") else batches.from_batch(number)


def position_of(batches: Any, number: int) -> list | None:
    """Where a batch begins, in a source that says."""
    return batches.position_of(number) if hasattr(batches, "position_of") else None


def _check_source(identity: str, marks: Iterable[Mark]) -> None:
    for mark in marks:
        if mark.number and mark.source != identity:
            raise ConfigError(
                f"the batches are not the same as those of the first run: they came from [{mark.source}], now from "
                f"[{identity}]. Give those, or begin anew in another folder"
            )


def _check(left: dict[int, Mark], count: int, again: Fingerprint, whole: bool) -> None:
    mark = left.pop(count, None)
    if mark is not None and ((whole and again.value != mark.value) or again.last != mark.last):
        raise ConfigError(
            f"the first {count} batches are not the same as those of the first run: they are others, or came in "
            "another order. To go on, give the batches of the first run in their order (a DataLoader that shuffles "
            "needs generator=torch.Generator().manual_seed(...)), or begin anew in another folder"
        )
