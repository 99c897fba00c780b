"""How a language model turns its residual stream into logits, by what the model offers."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

INSIDE = re.compile(
    r"hook_(q|k|v|z|pattern|attn_scores)\b|mlp\.hook_(pre|post)|(q|k|v|qkv|up|gate|in)_proj$|\.c_(attn|fc)$"
)
"""Names of places inside an attention or MLP block: what flows there is not added to the residual stream."""


class Unembedding(NamedTuple):
    """What is linear on the way from the residual stream to the logits: the final norm's gain, and the unembedding."""

    weight: Tensor
    """(d_vocab, d_model)."""
    gain: Tensor | None
    """(d_model,) of the final norm, or None where it has none."""
    centred: bool
    """Whether the final norm takes away the mean first."""

    def logits(self, directions: Tensor) -> Tensor:
        """(n, d_vocab) change of each logit, less their mean, by directions (n, d_model) in the residual stream.

        To first order, and up to the positive factor by which the final norm scales the position.
        """
        moved = directions.to(self.weight)
        if self.centred:
            moved = moved - moved.mean(1, keepdim=True)
        if self.gain is not None:
            moved = moved * self.gain
        logits = moved @ self.weight.T
        return logits - logits.mean(1, keepdim=True)


def unembedding(model: Any, site_name: str = "") -> Unembedding | None:
    """The unembedding of a language model; None where it has none, or where a site lies inside a block."""
    if INSIDE.search(site_name):
        return None
    W_U = getattr(model, "W_U", None)
    if isinstance(W_U, Tensor):  # TransformerLens
        return Unembedding(W_U.detach().T, *_gain(getattr(model, "ln_final", None), W_U.shape[0]))
    output: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(output, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    weight = weight.detach()
    return Unembedding(weight, *_gain(_final_norm(model, weight.shape[1]), weight.shape[1]))


def _final_norm(model: nn.Module, width: int) -> nn.Module | None:
    """The last normalisation outside the blocks, which are the only numbered modules."""
    found = None
    for name, module in model.named_modules():
        numbered = any(part.isdigit() for part in name.split("."))
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and not numbered and isinstance(weight, Tensor):
            found = module if weight.shape == (width,) and "embed" not in name else found
    return found


@torch.no_grad()
def _gain(norm: nn.Module | None, width: int) -> tuple[Tensor | None, bool]:
    """The gain of a norm, and whether it takes away the mean, found by what it does to three vectors.

    The formulas differ (Gemma multiplies by 1 + weight), the effect tells.
    """
    norm = getattr(norm, "original_component", norm)
    if norm is None or width % 2:
        return None, False
    first = next(iter(norm.parameters()), torch.empty(0))
    ones = torch.ones(1, 1, width, dtype=first.dtype, device=first.device)
    swinging = torch.cat([ones[..., : width // 2], -ones[..., width // 2 :]], -1)  # mean 0, root mean square 1
    signs = swinging.flatten()

    def antisymmetric(vector: Tensor) -> Tensor:  # a bias cancels; `forward` itself passes by the module's hooks
        return (norm.forward(vector) - norm.forward(-vector)).flatten() / 2

    gain = antisymmetric(swinging) * signs
    centred = bool((antisymmetric(ones).abs() < 1e-3 * gain.abs().clamp(min=1e-6)).all())
    return (None if torch.allclose(gain, torch.ones_like(gain)) else gain), centred
