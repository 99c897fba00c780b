"""The column-sorted index of a support, made once and shared by everything that reads the support."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saehooks.kernels.cpu_products import columns_of
from saehooks.kernels.remember import remembered


class Columns(NamedTuple):
    """Entries of compressed rows, sorted by column and then by row."""

    starts: Tensor
    """(d_sae + 1,) int64, where each column starts."""
    rows: Tensor
    """(nnz,) int64, the row of each entry."""
    places: Tensor
    """(nnz,) int64, where the entry stands in the compressed rows."""


@remembered
def columns(indices: Tensor, offsets: Tensor, d_sae: int) -> Columns:
    """Sort a support by column; remembered for as long as the ``indices`` tensor lives and is not changed."""
    found = columns_of(indices.contiguous().numpy(), offsets.contiguous().numpy(), d_sae)
    return Columns(*(torch.from_numpy(array) for array in found))
