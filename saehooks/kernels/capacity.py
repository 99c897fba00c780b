"""Codes of a size fixed beforehand, so that a training step never waits for the GPU and fits a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from saehooks.errors import ConfigError


class Capacity:
    """Room for the entries of one selection, and what became of it. Reading `used` or `overflowed` waits for the GPU.

    An overflow loses the entries beyond the room; give `found_inf` to a fused optimiser, which then leaves the
    parameters alone in that step, and enlarge the room when the host next looks. `saehooks.Trainer` does all that.
    """

    def __init__(self, entries: int) -> None:
        if entries < 1:
            raise ConfigError(f"a capacity needs room for at least one entry, got {entries}")
        self.entries = entries
        self._most: Tensor | None = None

    @property
    def wanted(self) -> Tensor | None:
        """() int64 on the device, what `used` reads; None if nothing was selected under this capacity."""
        return self._most

    @property
    def used(self) -> int:
        """Most entries that any selection in the block wanted."""
        return 0 if self._most is None else int(self._most)

    @property
    def overflowed(self) -> bool:
        """Whether a selection in the block wanted more entries than there was room."""
        return self.used > self.entries

    @property
    def found_inf(self) -> Tensor:
        """() float32 on the device, 1 after an overflow: what ``Adam(fused=True)`` reads as its ``found_inf``."""
        if self._most is None:
            raise ConfigError("nothing was selected under this capacity yet: run a forward inside the block first")
        return (self._most > self.entries).float()

    def reset(self) -> None:
        """Forget what was seen, in place, so that a captured graph keeps working."""
        if self._most is not None:
            self._most.zero_()

    def fit(self, offsets: Tensor) -> Tensor:
        """Offsets (rows + 1,) cut off at the room; notes what was wanted, without waiting."""
        self._want(offsets[-1])
        return offsets.clamp(max=self.entries)

    def note(self, lost: Tensor) -> None:
        """Count the selection as overflowed where ``lost``, () bool, is set."""
        self._want(lost.long() * (self.entries + 1))

    def _want(self, entries: Tensor) -> None:
        if self._most is None:
            self._most = torch.zeros_like(entries)
        torch.maximum(self._most, entries, out=self._most)


_active: list[Capacity | None] = []


@contextmanager
def capacity(entries: int) -> Iterator[Capacity]:
    """Give every selection of the GPU path a fixed number of entries: ``with capacity(96 * rows) as room: ...``.

    Without it a selection reads one number back from the GPU, to make its codes exactly as long as they are. Inside,
    nothing is read back: codes have ``entries`` entries, those past ``offsets[-1]`` are padding that belongs to no row
    (a latent that the batch did select, value 0). Paths on the CPU ignore it.
    """
    room = Capacity(entries)
    _active.append(room)
    try:
        yield room
    finally:
        _active.pop()


@contextmanager
def exactly() -> Iterator[None]:
    """Inside the block codes are as long as they are, whatever `capacity` is around it: for what takes no padding."""
    _active.append(None)
    try:
        yield
    finally:
        _active.pop()


def active() -> Capacity | None:
    """The innermost capacity, if any."""
    return _active[-1] if _active else None
