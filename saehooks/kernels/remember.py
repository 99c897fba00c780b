"""An index of a support, made once and shared by everything that reads the support."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Index = TypeVar("Index")


def remembered(make: Callable[[Tensor, Tensor, int], Index]) -> Callable[[Tensor, Tensor, int], Index]:
    """Wrap ``make(indices, offsets, d_sae)``: its result is kept while ``indices`` lives and neither tensor changes."""
    kept: Any = WeakTensorKeyDictionary()

    def index(indices: Tensor, offsets: Tensor, d_sae: int) -> Index:
        if indices.is_inference() or offsets.is_inference():  # these do not say whether they were changed
            return make(indices, offsets, d_sae)
        stamp = (indices._version, offsets._version, offsets.data_ptr(), d_sae)
        found = kept.get(indices)
        if found is None or found[0] != stamp:
            found = stamp, make(indices, offsets, d_sae)
            kept[indices] = found
        return found[1]

    index.kept = kept  # type: ignore[attr-defined]
    index.__doc__ = make.__doc__
    return index
