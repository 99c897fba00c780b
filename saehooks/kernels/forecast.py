"""Room for the codes of the next training step, foretold from earlier steps, so that no step waits for the GPU."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from saehooks.kernels.capacity import Capacity

LAG = 2
"""Steps that the host may be ahead of the GPU: sizes of steps before that are read, which the GPU has done long ago."""
WINDOW = 8
"""Steps whose largest size, a row, is the forecast."""
MARGIN = 1.25
"""Room given, in units of the forecast."""
WORTHWHILE = 8
"""Codes of more than a share 1 / WORTHWHILE of all scores are selected exactly: too much memory to have foretold."""


class Step(NamedTuple):
    """A step whose size is on its way to the host."""

    size: LateNumber
    entries: int
    """The room it was given."""
    batch: Tensor
    """(rows, d_in) what it was trained on, in case the room did not suffice."""


class LateNumber:
    """A number on the device whose copy to the host is under way; `read` waits for that copy and nothing else."""

    def __init__(self, number: Tensor) -> None:
        self._host = torch.empty((), dtype=number.dtype, pin_memory=number.is_cuda)
        self._host.copy_(number, non_blocking=True)
        self._arrived = None
        if number.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(number.device))

    def read(self) -> int:
        """The number."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._host)


class Forecast:
    """How many entries the next step's codes may have, from the sizes of the steps before.

    A step whose codes did not fit must have changed nothing (see `Capacity.found_inf`). `late` hands its batch back,
    `LAG` steps later, to be trained on again; the next steps are then selected exactly, until sizes are known again.
    """

    def __init__(self) -> None:
        self._sizes: deque[float] = deque(maxlen=WINDOW)  # entries a row
        self._steps: deque[Step] = deque()
        self._exact_steps = 1
        self.repeated = 0
        """Steps that had to be made again."""

    def room(self, rows: int, d_sae: int) -> int | None:
        """Entries to give the codes of the next step, of so many rows; None: select exactly, and wait for it."""
        if self._exact_steps:
            self._exact_steps -= 1
            return None
        wanted = int(max(self._sizes, default=d_sae) * rows * MARGIN)
        if wanted * WORTHWHILE > rows * d_sae:
            return None
        grain = 2 ** max(0, wanted.bit_length() - 4)  # few different sizes, so that memory is used again
        return -(-wanted // grain) * grain

    def add(self, entries: int, room: Capacity | None, batch: Tensor) -> None:
        """Note a step: its codes had so many entries, or, if they were given room, as many as the room will say."""
        if room is None or room.wanted is None:
            self._sizes.append(entries / max(1, len(batch)))
        else:
            self._steps.append(Step(LateNumber(room.wanted), room.entries, batch))

    def late(self, everything: bool = False) -> list[Tensor]:
        """Batches of steps whose codes did not fit: of the steps LAG and more before the next one, or of all."""
        missed = []
        while len(self._steps) >= (1 if everything else LAG):
            step = self._steps.popleft()
            size = step.size.read()
            self._sizes.append(size / max(1, len(step.batch)))
            if size > step.entries:
                missed.append(step.batch)
                self._exact_steps = WINDOW
        self.repeated += len(missed)
        return missed
