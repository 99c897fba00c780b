"""How wide the input and the output of a module are, and on which axis, as far as its layers say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

Channels = Literal["first", "last"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS_OF_MAPS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


class Widths(NamedTuple):
    """Sizes of the axis of features; None where the module does not say."""

    into: int | None
    out: int | None


def module_widths(module: nn.Module) -> Widths:
    """The widths of one leaf module: linear layers, convolutions, norms, embeddings, attention.

    Nothing is computed for it: a weight that another tensor determines, as under spectral norm, is not looked at.

    >>> module_widths(nn.Linear(3, 5)), module_widths(nn.Conv2d(3, 8, 1))
    (Widths(into=3, out=5), Widths(into=3, out=8))
    >>> module_widths(nn.LayerNorm(4))
    Widths(into=4, out=4)
    """
    if isinstance(module, torch.jit.ScriptModule):
        return Widths(None, None)
    into, out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(into, int) and isinstance(out, int):
        return Widths(into, out)
    if isinstance(module, CONVOLUTIONS):
        return Widths(module.in_channels, module.out_channels)
    if isinstance(module, nn.Embedding):
        return Widths(None, module.embedding_dim)
    if isinstance(module, nn.MultiheadAttention):
        return Widths(module.embed_dim, module.embed_dim)
    if isinstance(module, NORMS_OF_MAPS):
        both = getattr(module, "num_features", None) or getattr(module, "num_channels", None)
        return Widths(both, both)
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, (tuple, list)) and len(shape) == 1:
        return Widths(int(shape[0]), int(shape[0]))
    weight: Any = module._parameters.get("weight")
    if weight is not None and type(module).__name__ == "Conv1D":  # GPT-2's transposed linear layer
        return Widths(int(weight.shape[0]), int(weight.shape[1]))
    if getattr(weight, "ndim", 0) == 1 and "norm" in type(module).__name__.lower():
        return Widths(int(weight.shape[0]), int(weight.shape[0]))
    return Widths(None, None)


def config_width(config: Any) -> int | None:
    """The residual width in a Hugging Face config, under any of its names."""
    for name in ("hidden_size", "n_embd", "d_model", "dim"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def channels_axis(module: nn.Module) -> Channels | None:
    """On which axis of a feature map the output of a module has its features; None where its layers differ.

    >>> channels_axis(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())), channels_axis(nn.LayerNorm(8))
    ('first', 'last')
    """
    found: set[Channels] = set()
    for one in module.modules():
        if isinstance(one, (*CONVOLUTIONS, *NORMS_OF_MAPS)) or type(one).__name__ == "LayerNorm2d":
            found.add("first")
        elif module_widths(one).out is not None:
            found.add("last")
    return found.pop() if len(found) == 1 else None


class OutputWidths:
    """The widths of the outputs of a model's modules.

    Args:
        modules: the modules of the model by name.

    >>> block = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 9), nn.Linear(9, 4))
    >>> model = nn.Sequential(nn.Linear(2, 4), nn.ModuleList([block]))
    >>> OutputWidths({"": model, **dict(model.named_modules())}).of("1.0")
    4
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self._modules = modules

    def of(self, name: str) -> int | None:
        """The width of a module's output, or None.

        A layer says it. What ends in a layer of the residual width, which a config or the norms of the block say, has
        that width; so has a chain of convolutions that of its last.
        """
        module = self._modules[name]
        own = module_widths(module).out
        if own is not None or not name or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return own
        if isinstance(module, nn.Sequential):
            return self._of_chain(name, module)
        last = _last_layer(module)
        if last is None:
            return None
        if channels_axis(module) == "first":
            return last
        return last if last in self._residual_widths(name) else None

    def _of_chain(self, name: str, chain: nn.Sequential) -> int | None:
        for key, child in reversed(chain._modules.items()):
            if any(module_widths(one).out is not None for one in child.modules()):
                return self.of(f"{name}.{key}")
        return None

    def _residual_widths(self, name: str) -> set[int]:
        """The widths that the stream around a module may have, by the config above it and by the norms of its block."""
        found: set[int] = set()
        parts = name.split(".")
        for n in range(len(parts), -1, -1):
            above = self._modules.get(".".join(parts[:n]))
            if above is None:
                continue
            width = config_width(getattr(above, "config", None))
            if width is not None:
                found.add(width)
                break
            if n >= len(parts) - 1:  # the module itself, and what it is a part of
                norms = {module_widths(child).out for child in above.children() if _is_norm(child)} - {None}
                found |= norms if len(norms) == 1 else set()  # type: ignore[arg-type]
        return found


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _last_layer(module: nn.Module) -> int | None:
    """The width of the last layer with a matrix inside a module, as they were registered."""
    for one in reversed(list(module.modules())):
        if _is_norm(one) and channels_axis(one) != "first":
            continue
        width = module_widths(one).out
        if width is not None:
            return width
    return None
