"""What the arguments of one call say: tokens or embeddings, which of them are padding, and the cache they continue."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from saehooks.hosts.caches import find_cache

RAW = re.compile(r"(pixel_values|input_features|input_values|images?|sample|audio)\w*")
"""Arguments that become positions only inside the model: pictures, sounds, latents of a diffusion model."""

ASIDE = re.compile(r".*(mask|position|label|type|bias|encoder|timestep|index|output).*")
"""Arguments that stand beside the text and are none themselves."""

Kind = Literal["text", "hidden", "raw", "two texts", "nothing"]


class Given(NamedTuple):
    """What one call was given."""

    kind: Kind
    """``"text"``: tokens or embeddings of them; ``"hidden"``: other activations (batch, pos, width); ``"raw"``: what is
    not yet positions; ``"two texts"``: one for an encoder, one for a decoder."""
    shape: tuple[int, int] | None = None
    """(batch, pos) of this call alone."""
    tokens: Tensor | None = None
    """(batch, pos) int64."""
    mask: Tensor | None = None
    """(batch, pos) or longer by what the cache holds, bool, False at padding."""
    cache: Any = None
    position_ids: Tensor | None = None
    """(batch or 1, pos), as the caller gave them."""


def parameter_names(forward: Any) -> list[str]:
    """The names under which a forward takes its positional arguments."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def read_call(module: nn.Module, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
    """What a call of a module was given.

    Args:
        names: of the positional arguments; further ones are nameless.
    """
    given = dict(_named(names, args)) | dict(kwargs)
    decoder = _either(given, "decoder_input_ids", "decoder_inputs_embeds", "decoder_input")
    if decoder is not None:
        encoder_too = any(
            isinstance(value, Tensor) and (name in ("input_ids", "inputs_embeds", "input") or RAW.fullmatch(name))
            for name, value in given.items()
        )
        if encoder_too:
            return Given("two texts")
        return _text(decoder, given.get("decoder_attention_mask"), given)
    if isinstance(module, nn.Transformer):
        return Given("two texts")
    text = _either(given, "input_ids", "inputs_embeds")
    if text is not None:
        return _text(text, _mask(given), given)
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.dim() < 2 or value.dtype == torch.bool:
            if isinstance(value, Tensor) and value.dim() == 1 and is_integer(value) and not ASIDE.fullmatch(name):
                return _text(value[None], None, given)
            continue
        if RAW.fullmatch(name) or (value.dim() > 3 and not ASIDE.fullmatch(name)):
            return Given("raw")
        if ASIDE.fullmatch(name):
            continue
        if is_integer(value):
            return _text(value, _mask(given), given) if value.dim() == 2 else Given("nothing")
        if value.dim() == 3:
            shape = (value.shape[1], value.shape[0]) if is_pos_first(module) else (value.shape[0], value.shape[1])
            return Given("hidden", shape, None, _as_real(_mask(given), shape), find_cache(given.items()))
        break
    return Given("nothing")


def is_integer(value: Tensor) -> bool:
    """Whether a tensor, of any shape, holds whole numbers."""
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def is_pos_first(module: nn.Module) -> bool:
    """Whether torch's attention, or a block around it, takes (pos, batch, width).

    >>> is_pos_first(nn.MultiheadAttention(4, 1)), is_pos_first(nn.MultiheadAttention(4, 1, batch_first=True))
    (True, False)
    """
    if isinstance(module, nn.Transformer):
        return not module.batch_first
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)) and len(module.layers):
        module = module.layers[0]
    blocks = getattr(module, "resblocks", None)  # OpenAI's CLIP
    if isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks):
        module = blocks[0]
    for name in ("self_attn", "attn"):
        inner = getattr(module, name, None)
        module = inner if isinstance(inner, nn.Module) else module
    return isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and not module.batch_first


def _named(names: Sequence[str], args: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    for i, value in enumerate(args):
        yield names[i] if i < len(names) else f"#{i}", value


def _either(given: Mapping[str, Any], *names: str) -> Tensor | None:
    return next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)


def _text(text: Tensor, mask: Tensor | None, given: Mapping[str, Any]) -> Given:
    tokens = text if is_integer(text) else None
    if text.dim() < 2:
        return Given("nothing")
    shape = (text.shape[0], text.shape[1])
    position_ids = given.get("position_ids")
    if not (isinstance(position_ids, Tensor) and position_ids.dim() == 2 and position_ids.shape[1] == shape[1]):
        position_ids = None
    return Given("text", shape, tokens, _as_real(mask, shape), find_cache(given.items()), position_ids)


def _mask(given: Mapping[str, Any]) -> Tensor | None:
    mask = _either(given, "attention_mask", "one_zero_attention_mask")
    if mask is not None:
        return mask
    padding = _either(given, "src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask")
    if padding is None:
        return None
    return ~padding if padding.dtype == torch.bool else padding == 0


def _as_real(mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """A mask as bool, True at text; None for one of another form, such as (batch, heads, query, key)."""
    if mask is None or mask.dim() != 2 or mask.shape[1] < shape[1] or shape[0] % max(1, mask.shape[0]):
        return None
    real = mask if mask.dtype == torch.bool else mask > 0
    return real if len(real) == shape[0] else real.repeat_interleave(shape[0] // len(real), 0)
