"""A decoder of real size in plain torch, with a KV cache and random weights, so that nothing needs fetching."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Cache:
    """Keys and values of the positions so far, in memory set aside beforehand."""

    def __init__(self, model: Decoder, batch: int, length: int) -> None:
        like, heads = model.embed.weight, model.blocks[0].heads
        shape = len(model.blocks), 2, batch, heads, length, like.shape[1] // heads
        self._kept = torch.empty(shape, dtype=like.dtype, device=like.device)
        self._filled = 0

    def get_seq_length(self) -> int:
        """Positions that are filled; the name is Hugging Face's, which hosts know."""
        return self._filled

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, heads, pos, d_head) of all positions, the given ones behind those that are kept."""
        stop = self._filled + keys.shape[2]
        for kept, new in zip(self._kept[layer], (keys, values), strict=True):
            kept[:, :, self._filled : stop] = new
        return self._kept[layer, 0, :, :, :stop], self._kept[layer, 1, :, :, :stop]

    def advance(self, positions: int) -> None:
        """Count positions as filled, once every layer has extended."""
        self._filled += positions


class Block(nn.Module):
    """Attention and MLP, each behind a norm and around the residual stream."""

    def __init__(self, width: int, heads: int, layer: int, **made) -> None:
        super().__init__()
        self.heads, self.layer = heads, layer
        self.norm_1, self.norm_2 = nn.LayerNorm(width, **made), nn.LayerNorm(width, **made)
        self.qkv, self.out = nn.Linear(width, 3 * width, **made), nn.Linear(width, width, **made)
        self.up, self.down = nn.Linear(width, 4 * width, **made), nn.Linear(4 * width, width, **made)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        batch, pos, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, pos, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=pos > 1)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, pos, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Decoder(nn.Module):
    """Tokens (batch, pos) in, logits out. With a cache: a whole prompt first, then one token at a time."""

    def __init__(
        self, width: int, layers: int, heads: int, vocabulary: int = 32_000, context: int = 512, **made
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, **made)
        self.places = nn.Embedding(context, width, **made)
        self.blocks = nn.ModuleList(Block(width, heads, layer, **made) for layer in range(layers))
        self.norm = nn.LayerNorm(width, **made)
        self.unembed = nn.Linear(width, vocabulary, bias=False, **made)

    def forward(self, input_ids: Tensor, past_key_values: Cache | None = None, last_only: bool = False) -> Tensor:
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        stop = start + input_ids.shape[1]
        x = self.embed(input_ids) + self.places.weight[start:stop]
        for block in self.blocks:
            x = block(x, past_key_values)
        if past_key_values is not None:
            past_key_values.advance(input_ids.shape[1])
        return self.unembed(self.norm(x[:, -1:] if last_only else x))

    @torch.no_grad()
    def generate(self, prompt: Tensor, new: int) -> Tensor:
        """(batch, prompt + new) tokens, each the likeliest; the host reads none of them."""
        cache = Cache(self, prompt.shape[0], prompt.shape[1] + new)
        tokens, given = [prompt], prompt
        for _ in range(new):
            given = self(given, past_key_values=cache, last_only=True).argmax(-1)
            tokens.append(given)
        return torch.cat(tokens, dim=1)
