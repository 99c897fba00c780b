"""From the raw activation of a module to the (batch, pos, width) tensor that users know, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saehooks.errors import SiteError


def first_tensor(holder: Any, name: str) -> Tensor:
    """The first tensor of a module's output: itself, or the first inside a tuple, list or mapping.

    Raises:
        SiteError: there is no tensor in it, or the first one is not floating point.
    """
    if isinstance(holder, Tensor):
        found: Any = holder
    else:
        values = holder.values() if isinstance(holder, Mapping) else holder if isinstance(holder, (tuple, list)) else ()
        found = next((value for value in values if isinstance(value, Tensor)), None)
    if found is None:
        raise SiteError(f"site '{name}' carries a {type(holder).__name__} without a tensor in it")
    if not found.is_floating_point():
        raise SiteError(f"site '{name}' carries {found.dtype} {tuple(found.shape)}, not activations")
    return found


def with_first_tensor(holder: Any, new: Tensor) -> Any:
    """A copy of a module's output in which the first tensor is ``new``.

    >>> with_first_tensor((torch.zeros(1), None), torch.ones(1))
    (tensor([1.]), None)
    """
    if isinstance(holder, Tensor):
        return new
    if isinstance(holder, Mapping):
        key = next(key for key, value in holder.items() if isinstance(value, Tensor))
        if type(holder) is dict:
            return {**holder, key: new}
        return type(holder)(**{**holder, key: new})
    place = next(i for i, value in enumerate(holder) if isinstance(value, Tensor))
    values = [*holder[:place], new, *holder[place + 1 :]]
    if isinstance(holder, list):
        return values
    return type(holder)(*values) if hasattr(holder, "_fields") else tuple(values)


@dataclass(frozen=True)
class View:
    """The user's view of a raw activation.

    >>> raw = torch.arange(12.0).reshape(1, 2, 3, 2)                # batch pos heads d_head
    >>> View(heads=3).read(raw).shape, View(heads=3, head=1).read(raw).shape
    (torch.Size([1, 2, 6]), torch.Size([1, 2, 2]))
    """

    conversion: Any = None
    """A TransformerLens ``hook_conversion`` (``convert`` and ``revert``), applied as its ``add_hook`` does."""
    batch_first: bool = True
    """False where the raw activation is (pos, batch, width)."""
    heads: int | None = None
    """Number of heads where the activation is (batch, pos, heads, d_head)."""
    head: int | None = None
    """The one head to show; None joins them all."""

    def read(self, raw: Tensor) -> Tensor:
        """(batch, pos, width), a view of ``raw`` wherever one exists."""
        acts = self._unfold(raw)
        if self.heads is not None and acts.dim() == 4:
            return acts.flatten(-2) if self.head is None else acts[..., self.head, :]
        return acts.unsqueeze(1) if acts.dim() == 2 else acts

    def write(self, new: Tensor, raw: Tensor) -> Tensor:
        """The raw activation in which the part that ``read`` shows is ``new``; ``raw`` itself is not touched."""
        acts = self._unfold(raw)
        if self.heads is not None and acts.dim() == 4:
            if self.head is None:
                new = new.unflatten(-1, acts.shape[-2:])
            else:
                new = torch.cat([acts[..., : self.head, :], new.unsqueeze(-2), acts[..., self.head + 1 :, :]], dim=-2)
        elif acts.dim() == 2:
            new = new.squeeze(1)
        return with_strides_of(raw, self._fold(new))

    def _unfold(self, raw: Tensor) -> Tensor:
        acts = raw if self.conversion is None else self.conversion.convert(raw)
        return acts if self.batch_first or acts.dim() < 3 else acts.transpose(0, 1)

    def _fold(self, acts: Tensor) -> Tensor:
        acts = acts if self.batch_first or acts.dim() < 3 else acts.transpose(0, 1)
        return acts if self.conversion is None else self.conversion.revert(acts)


def with_strides_of(raw: Tensor, new: Tensor) -> Tensor:
    """``new`` laid out in memory as ``raw`` is: the kernels downstream choose their path, and their rounding, by it."""
    overlapping = any(stride == 0 and size > 1 for stride, size in zip(raw.stride(), raw.shape, strict=True))
    if new.stride() == raw.stride() or overlapping:
        return new
    return torch.empty_strided(raw.shape, raw.stride(), dtype=raw.dtype, device=raw.device).copy_(new)
