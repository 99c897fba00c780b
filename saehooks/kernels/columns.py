"""The column-sorted index of a support, made once and shared by everything that reads the support."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_KEPT = "_saehooks_columns"


class Columns(NamedTuple):
    """Entries of compressed rows, sorted by column and then by row."""

    starts: Tensor
    """(d_sae + 1,) int64, where each column starts."""
    rows: Tensor
    """(nnz,) int64, the row of each entry."""
    places: Tensor
    """(nnz,) int64, where the entry stands in the compressed rows."""


def columns(indices: Tensor, offsets: Tensor, d_sae: int) -> Columns:
    """Sort a support by column; kept on the ``indices`` tensor for as long as that lives and is not changed."""
    stamp = (indices._version, offsets._version, offsets.data_ptr(), d_sae)
    kept = getattr(indices, _KEPT, None)
    if kept is None or kept[0] != stamp:
        kept = stamp, _sort(indices, offsets, d_sae)
        setattr(indices, _KEPT, kept)
    return kept[1]


def _sort(indices: Tensor, offsets: Tensor, d_sae: int) -> Columns:
    from saehooks.kernels.cpu_products import columns_of

    found = columns_of(indices.contiguous().numpy(), offsets.contiguous().numpy(), d_sae)
    return Columns(*(torch.from_numpy(array) for array in found))
