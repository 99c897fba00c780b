"""A fingerprint of the batches seen so far, by which a resumed training knows its data again."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

SAMPLE = 65_536
"""Elements of a tensor that are read: larger ones are sampled evenly."""
FACTOR = 6_364_136_223_846_793_005
"""Multiplier of a linear congruential generator modulo 2^64. Source: Knuth, MMIX."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fingerprint:
    """A number that depends on every batch given to `add`, and on their order.

    Tensors are read where they are and nothing waits for a GPU until `value` is asked for.

    >>> one, other = Fingerprint(), Fingerprint()
    >>> one.add(torch.tensor([1, 2])); one.add(torch.tensor([3]))
    >>> other.add(torch.tensor([3])); other.add(torch.tensor([1, 2]))
    >>> one.value == other.value
    False
    """

    def __init__(self, value: int = 0, last: int = 0) -> None:
        self._value: int | Tensor = value
        self._last: int | Tensor = last

    def add(self, batch: Any) -> None:
        """Take in one more batch: tensors, arrays, texts, numbers, and dicts, lists and tuples of them."""
        self._last = 0
        for part in _parts(batch):
            self._last = _mixed(self._last, part)
        self._value = _mixed(self._value, self._last)

    @property
    def value(self) -> int:
        """The fingerprint of all batches, a signed 64-bit number."""
        return int(self._value)

    @property
    def last(self) -> int:
        """The fingerprint of the last batch alone."""
        return int(self._last)


def _mixed(before: int | Tensor, part: int | Tensor) -> int | Tensor:
    """Depends on both and on their order."""
    mixed = before * FACTOR if isinstance(before, Tensor) else _wrapped(before * FACTOR)
    if isinstance(part, Tensor) and isinstance(mixed, Tensor):
        mixed = mixed.to(part.device)
    total = mixed + part
    return total if isinstance(total, Tensor) else _wrapped(total)


def _wrapped(number: int) -> int:
    """As a signed 64-bit integer, overflow wrapped as torch's int64 does."""
    return (number + 2**63) % 2**64 - 2**63


def _parts(batch: Any) -> list[int | Tensor]:
    """Numbers that describe a batch, () int64 tensors among them."""
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "fiub":
        batch = torch.as_tensor(batch, device="cpu")
    if isinstance(batch, Tensor):
        return [_of_text(f"{tuple(batch.shape)} {batch.dtype}"), _of_tensor(batch)]
    if isinstance(batch, Mapping):
        return [part for name in sorted(batch, key=str) for part in (_of_text(str(name)), *_parts(batch[name]))]
    if isinstance(batch, (list, tuple)):
        return [len(batch), *(part for one in batch for part in _parts(one))]
    if isinstance(batch, (str, int, float, bool, type(None))):
        return [_of_text(repr(batch))]
    return [_of_text(type(batch).__name__)]  # its text may hold an address, which is another one every time


def _of_text(text: str) -> int:
    return zlib.crc32(text.encode())


@torch.no_grad()
def _of_tensor(tensor: Tensor) -> Tensor:
    """() int64, a weighted sum of the bits of the elements."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.detach().reshape(-1)
    flat = flat[:: max(1, flat.numel() // SAMPLE)].contiguous()
    bits = flat.view(INTEGERS[flat.element_size()]).to(torch.int64)
    weights = torch.arange(1, len(bits) + 1, dtype=torch.int64, device=bits.device) * FACTOR
    # Products are folded, so that a swap of two elements is seen in the low bits too.
    mixed = bits * weights
    return (mixed ^ (mixed >> 29)).sum()
