"""Where the towers of Hugging Face's CLIPs, and its ViTs, read their output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def end_of_text(module: nn.Module, tokens: Tensor) -> Tensor | None:
    """(batch,) int64, the position that a CLIP's text tower reads; None where ``module`` is no such tower."""
    eos = getattr(module, "eos_token_id", None)
    if not isinstance(eos, int) or not hasattr(module, "final_layer_norm") or not hasattr(module, "embeddings"):
        return None
    # Old configurations say 2 whatever the tokenizer, and then the largest token ends a text.
    return tokens.argmax(-1) if eos == 2 else (tokens == eos).int().argmax(-1)


def reads_first(module: nn.Module) -> bool:
    """Whether ``module`` is a CLIP's tower of pictures, or a ViT, that reads its class token."""
    inside: Any = getattr(module, "embeddings", None)
    if isinstance(getattr(inside, "class_embedding", None), Tensor):
        return hasattr(module, "post_layernorm")
    vit = getattr(getattr(module, "config", None), "model_type", None) in ("vit", "deit")
    return vit and isinstance(getattr(inside, "cls_token", None), Tensor)


def up_to(end: Tensor, pos: int) -> Tensor:
    """(batch, pos) bool, True up to the end of each text; everywhere in a text that has none but its first token."""
    column = torch.arange(pos, device=end.device)
    return (column <= end[:, None]) | (end[:, None] == 0)
