"""From the raw activation of a module to the (batch, pos, width) tensor that users know, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saehooks.errors import SiteError, WidthError
from saehooks.hosts.widths import Channels


def first_tensor(holder: Any, name: str) -> Tensor:
    """The first tensor, of any shape, of a module's output: itself, or the first inside a tuple, list or mapping.

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
    """A copy of a module's output whose first tensor is ``new``, of any shape.

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
class ActivationView:
    """The user's view of a raw activation.

    >>> raw = torch.arange(12.0).reshape(1, 2, 3, 2)                # batch pos heads d_head
    >>> ActivationView(heads=3).read(raw).shape, ActivationView(heads=3, head=1).read(raw).shape
    (torch.Size([1, 2, 6]), torch.Size([1, 2, 2]))

    A feature map (batch, width, height, width of the picture), or with the features last, has its places as positions,
    row by row.

    >>> ActivationView(is_map=True, channels="first").read(torch.zeros(1, 8, 4, 5)).shape
    torch.Size([1, 20, 8])
    """

    conversion: Any = None
    """A TransformerLens ``hook_conversion`` (``convert`` and ``revert``), applied as its ``add_hook`` does."""
    batch_first: bool = True
    """False where the raw activation is (pos, batch, width)."""
    heads: int | None = None
    """Number of heads where the activation is (batch, pos, heads, d_head)."""
    head: int | None = None
    """The one head to show; None joins them all."""
    is_map: bool = False
    """Whether an activation of more than three axes is a feature map."""
    channels: Channels | None = None
    """On which axis a feature map has its features, if the layers say so; their number decides where they do not."""
    width: int | None = None
    """How many features there are, if it is known."""

    def read(self, raw: Tensor) -> Tensor:
        """(batch, pos, width), a view of ``raw`` wherever one exists."""
        acts = self._unfold(raw)
        if self.heads is not None and acts.dim() == 4:
            return acts.flatten(-2) if self.head is None else acts[..., self.head, :]
        if self._has_places(acts):
            return acts.flatten(2).transpose(1, 2) if self._is_channels_first(acts) else acts.flatten(1, -2)
        return acts.unsqueeze(1) if acts.dim() == 2 else acts

    def write(self, new: Tensor, raw: Tensor) -> Tensor:
        """A copy of ``raw`` in which the part that ``read`` shows is ``new`` (batch, pos, width)."""
        acts = self._unfold(raw)
        if self.heads is not None and acts.dim() == 4:
            if self.head is None:
                new = new.unflatten(-1, acts.shape[-2:])
            else:
                new = torch.cat([acts[..., : self.head, :], new.unsqueeze(-2), acts[..., self.head + 1 :, :]], dim=-2)
        elif self._has_places(acts):
            new = (new.transpose(1, 2) if self._is_channels_first(acts) else new).reshape(acts.shape)
        elif acts.dim() == 2:
            new = new.squeeze(1)
        return with_strides_of(raw, self._fold(new))

    def _has_places(self, acts: Tensor) -> bool:
        """Whether these are features of places: of a picture, or a sequence of convolutions, (batch, width, pos)."""
        if acts.dim() == 3:
            return self.channels == "first" and acts.shape[1] == self.width
        return self.is_map and acts.dim() > 3

    def _is_channels_first(self, acts: Tensor) -> bool:
        """Whether the features of a map are on its second axis, and not on its last.

        Raises:
            WidthError: nothing says so.
        """
        fitting = [axis for axis in range(1, acts.dim()) if acts.shape[axis] == self.width]
        axis = {"first": 1, "last": acts.dim() - 1}.get(self.channels or "")
        if axis is not None and acts.dim() > 3 and (self.width is None or axis in fitting):
            return axis == 1
        if (axis is None or acts.dim() == 3) and fitting in ([1], [acts.dim() - 1]):
            return fitting == [1]
        wanted = "their number is not known" if self.width is None else f"{self.width} are expected"
        raise WidthError(f"a feature map {tuple(acts.shape)} does not tell which axis holds its features: {wanted}")

    def _unfold(self, raw: Tensor) -> Tensor:
        acts = raw if self.conversion is None else self.conversion.convert(raw)
        return acts if self.batch_first or acts.dim() < 3 else acts.transpose(0, 1)

    def _fold(self, acts: Tensor) -> Tensor:
        acts = acts if self.batch_first or acts.dim() < 3 else acts.transpose(0, 1)
        return acts if self.conversion is None else self.conversion.revert(acts)


def with_strides_of(raw: Tensor, new: Tensor) -> Tensor:
    """``new`` with the strides of ``raw``, of the same shape: kernels downstream choose their rounding by them."""
    overlapping = any(stride == 0 and size > 1 for stride, size in zip(raw.stride(), raw.shape, strict=True))
    if new.stride() == raw.stride() or overlapping:
        return new
    return torch.empty_strided(raw.shape, raw.stride(), dtype=raw.dtype, device=raw.device).copy_(new)
