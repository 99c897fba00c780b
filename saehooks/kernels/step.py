"""What the kernels of one step know beside their tensors. It is passed on, never looked up: threads cannot mix.

A `Step` says which backend serves, how many entries the codes may have, which tables keep their gradients as sparse
sums, and where the bfloat16 copies of tables are. An SAE without one works by device and dtype, with exact sizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saehooks.errors import ConfigError
from saehooks.support import Support


@dataclass(frozen=True, eq=False)
class Step:
    """What one forward and its backward share: ``sae(x, step=Step(capacity=Capacity(96 * rows)))``."""

    backend: str | None = None
    """``"reference"``, ``"cpu"`` or ``"gpu"``: whose kernels select and multiply; None: by device and dtype."""
    capacity: Capacity | None = None
    """Fixes how many entries each selection on the GPU has, so that the host need not wait; None: exact sizes."""
    sparse_gradients: SparseGradients | None = None
    """Keeps the gradients of some tables as sparse sums, for an optimiser that takes them so."""
    bfloat16_tables: Bfloat16Tables | None = None
    """One bfloat16 copy of each table for all that read it in this step."""
    screen_tables: ScreenTables | None = None
    """Where the CPU's screen keeps its copy of the keys between steps; None: it is made for each selection."""

    def exact(self) -> Step:
        """The same step with codes as long as they are: for what takes no padding."""
        return self if self.capacity is None else replace(self, capacity=None)

    def with_room(self, entries: int) -> Step:
        """The same step with room for so many entries, if it gives codes a fixed size at all."""
        return self if self.capacity is None else replace(self, capacity=Capacity(entries))

    def table(self, table: Tensor) -> Tensor:
        """The table (d_sae, d) as products read it: its bfloat16 copy if this step makes any, else itself."""
        return table if self.bfloat16_tables is None else self.bfloat16_tables.copy_of(table)

    def keeps_gradient(self, table: Tensor, values: Tensor, support: Support, left: Tensor) -> bool:
        """Keep a contribution to the gradient of a table (d_sae, d) as a sparse sum, if one is wanted."""
        kept = self.sparse_gradients
        return kept is not None and kept.take(table, Contribution(values, support, left))


class Capacity:
    """Room for the entries of one selection, and what became of it. Reading `used` or `overflowed` waits for the GPU.

    Without it a selection reads one number back from the GPU, to make its codes exactly as long as they are. With it
    nothing is read back: codes have ``entries`` entries, those past ``offsets[-1]`` are padding that belongs to no row
    (a latent that the batch did select, value 0). Backends on the CPU ignore it.

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
        """Most entries that any selection wanted."""
        return 0 if self._most is None else int(self._most)

    @property
    def overflowed(self) -> bool:
        """Whether a selection wanted more entries than there was room."""
        return self.used > self.entries

    @property
    def found_inf(self) -> Tensor:
        """() float32 on the device, 1 after an overflow: what ``Adam(fused=True)`` reads as its ``found_inf``."""
        if self._most is None:
            raise ConfigError("nothing was selected under this capacity yet: run a forward with it first")
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


# ---------------------------------------------------------- gradients of tables


class Contribution(NamedTuple):
    """One sparse sum of a table's gradient: row ``i`` gets ``value * left[row]`` of the entries with index ``i``."""

    values: Tensor
    """(nnz,) the value of each entry."""
    support: Support
    """Row and latent of each entry: indices (nnz,), offsets (rows + 1,)."""
    left: Tensor
    """(rows, d) what the values multiply."""


class SparseGradients:
    """Contributions by table, in the order in which the backward pass met them.

    Args:
        tables: (d_sae, d) each, as the products get them; their gradients are kept here and not written.
    """

    def __init__(self, tables: Iterable[Tensor]) -> None:
        self._found: dict[tuple, list[Contribution]] = {_place(table): [] for table in tables}

    def take(self, table: Tensor, contribution: Contribution) -> bool:
        """Keep a contribution if the table (d_sae, d) is one of these; returns whether it is."""
        found = self._found.get(_place(table))
        if found is not None:
            found.append(contribution)
        return found is not None

    def pop(self, table: Tensor) -> list[Contribution]:
        """The contributions of a table (d_sae, d), which are forgotten."""
        found = self._found.get(_place(table), [])
        taken, found[:] = list(found), []
        return taken


NUMPY_TYPES = (torch.float32, torch.float64)
"""What numpy reads as it is."""
FEW_MARKS = 2048
"""Marks that are looked at where a product costs little more than reading its table."""


def marks(table: Tensor, most: int | None = None) -> bytes:
    """One number of each row of a table (rows, d), or of ``most``: what tells of changes that torch does not count,
    those through ``.data``, through numpy or in another process. As bytes, so that NaN equals itself."""
    row, column, place = _marked(*table.shape, most)
    if table.device.type == "cpu" and table.dtype in NUMPY_TYPES and table.is_contiguous():
        return table.numpy().reshape(-1).take(place).tobytes()  # a third of the time of torch's own
    return table[torch.from_numpy(row), torch.from_numpy(column)].double().cpu().numpy().tobytes()


@lru_cache(maxsize=16)
def _marked(rows: int, width: int, most: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, their columns (all in turn), and where these are in memory."""
    row = np.arange(0, rows, 1 if most is None else max(1, rows // most))
    column = np.arange(len(row)) % width
    return row, column, row * width + column


def _place(table: Tensor) -> tuple:
    """Where a table lies in memory and how: a part of it, or its transpose, is another table."""
    return table.data_ptr(), tuple(table.shape), table.stride()


# ------------------------------------------------------------- bfloat16 copies


def bfloat16_is_wanted() -> bool:
    """Whether float32 products are to be made in bfloat16: ``torch.set_float32_matmul_precision("medium")``."""
    try:
        return torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:  # set through torch's newer switches, which know no bfloat16
        return False


class Bfloat16Tables:
    """Copies made once while a step reads the same table again and again, where products are made in bfloat16."""

    def __init__(self) -> None:
        self._made: dict[tuple, tuple[Tensor, Tensor]] = {}

    def copy_of(self, table: Tensor) -> Tensor:
        """The bfloat16 copy of a float32 table (d_sae, d), if such products are wanted; otherwise the table.

        A table that was changed since, as far as torch counts, is copied again. The table is held with its copy, so
        that no other can take its place in memory.
        """
        if table.dtype != torch.float32 or not bfloat16_is_wanted():
            return table
        name = (*_place(table), table._version)
        if name not in self._made:
            self._made[name] = table.detach(), table.detach().to(torch.bfloat16)
        return self._made[name][1]


class Seen(NamedTuple):
    """A table as it was when something was made of it. It is held, so that no other can take its place in memory."""

    table: Tensor
    """(rows, d)."""
    version: int
    marks: bytes
    most_marks: int | None

    @classmethod
    def now(cls, table: Tensor, most_marks: int | None = None) -> Seen:
        """A table as it is; one made under inference_mode does not say whether it changes, and cannot be seen."""
        held = table.detach()
        return cls(held, table._version, marks(held, most_marks), most_marks)

    def is_still(self, table: Tensor) -> bool:
        """Whether a table is this one, unchanged as far as torch counts changes and its `marks` tell."""
        if table.is_inference() or _place(self.table) != _place(table) or self.version != table._version:
            return False
        return self.marks == marks(table.detach(), self.most_marks)


class ScreenTables:
    """The CPU screens' rounded copies of a dictionary's tables, kept while a table is the same.

    Copies of an SAE, and its pickle, start without one.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[Seen, Tensor | None, Any]] = {}

    def of(
        self,
        keys: Tensor,
        bias: Tensor | None,
        make: Callable[[Tensor, Tensor | None], Any],
        most_marks: int | None = None,
        name: str = "",
    ) -> Any:
        """``make(keys, bias)`` of keys (d_sae, d) and a bias (d_sae,), made anew if either changed; ``name`` tells
        several tables of one dictionary apart."""
        kept = self._kept.get((make, name))
        if kept is not None:
            seen, held_bias, rounded = kept
            same_bias = held_bias is bias if held_bias is None or bias is None else torch.equal(held_bias, bias)
            if same_bias and seen.is_still(keys):
                return rounded
        rounded = make(keys, bias)
        if not keys.is_inference():
            self._kept[make, name] = Seen.now(keys, most_marks), None if bias is None else bias.clone(), rounded
        return rounded

    @property
    def nbytes(self) -> int:
        """Memory that is held beyond the table itself."""
        return sum(rounded.nbytes for *_, rounded in self._kept.values())

    def __deepcopy__(self, memo: dict) -> ScreenTables:
        return ScreenTables()

    def __reduce__(self) -> tuple:
        return ScreenTables, ()


class KeptProduct:
    """What was made of some tables, kept while they are the same. Copies, and pickles, start without any."""

    def __init__(self) -> None:
        self._kept: tuple[list[Seen], Tensor] | None = None

    def of(self, make: Callable[..., Tensor], *tables: Tensor) -> Tensor:
        """``make(*tables)``, made anew if a table has changed; no inference tensor, so that gradients can pass it."""
        if self._kept is not None and all(map(Seen.is_still, self._kept[0], tables)):
            return self._kept[1]
        with torch.inference_mode(False), torch.no_grad():
            seen = [Seen.now(table) for table in tables]
            made = make(*(one.table for one in seen))
        self._kept = seen, made
        return made

    @property
    def nbytes(self) -> int:
        """Memory that is held beyond the tables."""
        return 0 if self._kept is None else self._kept[-1].nbytes

    def __deepcopy__(self, memo: dict) -> KeptProduct:
        return KeptProduct()

    def __reduce__(self) -> tuple:
        return KeptProduct, ()


# ------------------------------------------------------------ sizes of codes to come

LAG = 2
"""Steps that the host may be ahead of the GPU: sizes of steps before that are read, which the GPU has done long ago."""
WINDOW = 8
"""Steps whose largest size, a row, is the forecast."""
MARGIN = 1.25
"""Room given, in units of the forecast."""
MAX_DENSITY = 1 / 8
"""Codes of more than this share of all scores are selected exactly: too much memory to reserve on a guess."""


class SentStep(NamedTuple):
    """A step whose size is on its way to the host."""

    size: LateNumber
    entries: int
    """The room it was given."""
    batch: Tensor
    """(rows, d_in) what it was trained on, in case the room did not suffice."""


class LateNumber:
    """A number on the device whose copy to the host is under way; `read` waits for that copy and nothing else."""

    def __init__(self, number: Tensor) -> None:
        self._host = torch.empty((), dtype=number.dtype, device="cpu", pin_memory=number.is_cuda)
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
    """Sizes code buffers from earlier steps; a batch that overflows changes nothing and is retried.

    A step whose codes did not fit must have changed nothing (see `Capacity.found_inf`). `overflowed_batches` hands its
    batch back, `LAG` steps later, to be trained on again; the next steps are then selected exactly, until sizes are
    known again.
    """

    def __init__(self) -> None:
        self._sizes: deque[float] = deque(maxlen=WINDOW)  # entries a row
        self._steps: deque[SentStep] = deque()
        self._exact_steps = 1
        self.repeated = 0
        """Steps that had to be made again."""

    def capacity_for(self, rows: int, d_sae: int) -> Capacity | None:
        """Room for the codes of the next step, of so many rows; None: select exactly, and wait for the size."""
        if self._exact_steps:
            self._exact_steps -= 1
            return None
        wanted = int(max(self._sizes, default=d_sae) * rows * MARGIN)
        if wanted > MAX_DENSITY * rows * d_sae:
            return None
        grain = 2 ** max(0, wanted.bit_length() - 4)  # few different sizes, so that memory is used again
        return Capacity(max(1, -(-wanted // grain) * grain))

    def add(self, entries: int, capacity: Capacity | None, batch: Tensor) -> None:
        """Add a step on ``batch`` (rows, d_in): its codes had so many entries, or as many as its room will say."""
        if capacity is None or capacity.wanted is None:
            self._sizes.append(entries / max(1, len(batch)))
        else:
            self._steps.append(SentStep(LateNumber(capacity.wanted), capacity.entries, batch))

    def overflowed_batches(self, everything: bool = False) -> list[Tensor]:
        """Batches (rows, d_in) whose codes did not fit: of the steps LAG and more before the next one, or of all."""
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


DEFAULT = Step()
"""By device and dtype, sizes exact, gradients written."""
