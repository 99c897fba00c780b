"""Half-precision copies of tables, made once while a training step reads the same table again and again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_active: list[dict[tuple, Tensor]] = []


@contextmanager
def shared_copies() -> Iterator[None]:
    """Inside the block, where products are made in bfloat16, one copy of a table serves all that read it."""
    _active.append({})
    try:
        yield
    finally:
        _active.pop()


def bfloat16_is_wanted() -> bool:
    """Whether float32 products are to be made in bfloat16: ``torch.set_float32_matmul_precision("medium")``."""
    try:
        return torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:  # set through torch's newer switches, which know no bfloat16
        return False


def shared_copy(table: Tensor) -> Tensor:
    """The bfloat16 copy of a float32 table inside `shared_copies`, if wanted; otherwise the table.

    A table that was changed since, as far as torch counts, is copied again.
    """
    if not _active or table.dtype != torch.float32 or not bfloat16_is_wanted():
        return table
    name = (table.data_ptr(), table.shape, table.stride(), table._version)
    if name not in _active[-1]:
        _active[-1][name] = table.detach().to(torch.bfloat16)
    return _active[-1][name]
