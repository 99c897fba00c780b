"""The column-sorted index of a support, made once and shared by everything that reads the support."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from saehooks.kernels.cpu_products import columns_of


class Columns(NamedTuple):
    """Entries of compressed rows, sorted by column and then by row."""

    starts: Tensor
    """(d_sae + 1,) int64, where each column starts."""
    rows: Tensor
    """(nnz,) int64, the row of each entry."""
    places: Tensor
    """(nnz,) int64, where the entry stands in the compressed rows."""


_kept = WeakTensorKeyDictionary()


def columns(indices: Tensor, offsets: Tensor, d_sae: int) -> Columns:
    """Sort a support by column; remembered for as long as the ``indices`` tensor lives and is not changed."""
    if indices.is_inference() or offsets.is_inference():  # these do not say whether they were changed
        return _sort(indices, offsets, d_sae)
    stamp = (indices._version, offsets._version, offsets.data_ptr(), d_sae)
    kept = _kept.get(indices)
    if kept is None or kept[0] != stamp:
        kept = stamp, _sort(indices, offsets, d_sae)
        _kept[indices] = kept
    return kept[1]


def _sort(indices: Tensor, offsets: Tensor, d_sae: int) -> Columns:
    found = columns_of(indices.contiguous().numpy(), offsets.contiguous().numpy(), d_sae)
    return Columns(*(torch.from_numpy(array) for array in found))
