"""How wide the input and the output of a module are, as far as its parameters say."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn


class Widths(NamedTuple):
    """Last-axis sizes; None where the module does not say."""

    into: int | None
    out: int | None


def module_widths(module: nn.Module) -> Widths:
    """The widths of one leaf module: linear layers, norms, embeddings, attention.

    >>> module_widths(nn.Linear(3, 5))
    Widths(into=3, out=5)
    >>> module_widths(nn.LayerNorm(4))
    Widths(into=4, out=4)
    """
    into, out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(into, int) and isinstance(out, int):
        return Widths(into, out)
    if isinstance(module, nn.Embedding):
        return Widths(None, module.embedding_dim)
    if isinstance(module, nn.MultiheadAttention):
        return Widths(module.embed_dim, module.embed_dim)
    weight: Any = getattr(module, "weight", None)
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
