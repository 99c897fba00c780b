"""A Llama from a GGUF file in two seconds; transformers takes twelve, most of them for the header, read twice."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saehooks.errors import FormatError

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Formats of `struct`, by the header's number of a type; 8 is a string and 9 an array."""

SUFFIXES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""A block's modules: what llama.cpp calls them, and what transformers does."""

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def llama(file: Path) -> Any:
    """Load a Llama from a GGUF file, dequantised to float32, as transformers' own reader does, bit for bit.

    Args:
        file: one that is not split.
    Returns:
        LlamaForCausalLM in eval mode.
    Raises:
        FormatError: another architecture, scaled rotary embeddings, or a tensor that a Llama does not have.
    Source: the GGUF specification (ggml, docs/gguf.md); dequantising is the gguf package's.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    facts, tensors = contents(file)
    if facts.get("general.architecture") != "llama":
        raise FormatError(f"{file} holds a {facts.get('general.architecture')!r}, not a 'llama'")
    of = {name.removeprefix("llama."): value for name, value in facts.items() if name.startswith("llama.")}
    if of.get("rope.scaling.type", "none") != "none":
        raise FormatError(f"{file} scales its rotary embeddings ({of['rope.scaling.type']}), which is not read here")
    heads = {"q_proj": of["attention.head_count"]}
    heads["k_proj"] = of.get("attention.head_count_kv", heads["q_proj"])
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    given = {f"{name}_token_id": facts.get(f"tokenizer.ggml.{key}_token_id") for name, key in special.items()}
    config = LlamaConfig(
        hidden_size=of["embedding_length"],
        intermediate_size=of["feed_forward_length"],
        num_hidden_layers=of["block_count"],
        num_attention_heads=heads["q_proj"],
        num_key_value_heads=heads["k_proj"],
        head_dim=of.get("rope.dimension_count"),
        max_position_embeddings=of["context_length"],
        rms_norm_eps=of["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": of.get("rope.freq_base", 10_000.0)},
        vocab_size=of.get("vocab_size") or len(facts["tokenizer.ggml.tokens"]),
        tie_word_embeddings="output.weight" not in tensors,
        **{name: token for name, token in given.items() if token is not None},
    )
    state = {transformers_name(name): tensor for name, tensor in tensors.items()}
    for name in state:
        module = name.split(".")[-2]
        if module in heads:
            state[name] = rotated_by_halves(state[name], heads[module])
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()


def transformers_name(name: str) -> str:
    """The name in transformers of a tensor of llama.cpp.

    Raises:
        FormatError: a Llama has no such tensor.

    >>> transformers_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    *place, module, kind = name.split(".")
    if place[:1] == ["blk"] and module in SUFFIXES:
        return f"model.layers.{place[1]}.{SUFFIXES[module]}.{kind}"
    if not place and module in OUTSIDE:
        return f"{OUTSIDE[module]}.{kind}"
    raise FormatError(f"a Llama has no tensor {name!r}")


def rotated_by_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix, (heads x d_head, d_model), in transformers' order.

    llama.cpp rotates neighbouring pairs of a head's dimensions, transformers the first half with the second.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


# ------------------------------------------------------------------------ the file


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a GGUF file: its facts, and its tensors in float32.

    Raises:
        FormatError: not a GGUF file of version 2 or 3, or one that ends too early.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    data = np.memmap(file, np.uint8, "r")
    header = Header(data.data)
    try:
        magic, version, tensors, facts = header.numbers("IIQQ")
        if magic != int.from_bytes(b"GGUF", "little") or version not in (2, 3):
            raise FormatError(f"{file} is not a GGUF file of version 2 or 3")
        known = {header.string(): header.value(*header.numbers("I")) for _ in range(facts)}
        places = []
        for _ in range(tensors):
            name, (axes,) = header.string(), header.numbers("I")
            places.append((name, header.numbers("Q" * axes)[::-1], *header.numbers("IQ")))
    except struct.error as error:
        raise FormatError(f"{file} ends amid its header") from error
    step = known.get("general.alignment", 32)
    start = -(-header.at // step) * step
    found = {}
    for name, shape, kind, offset in places:
        quantised = GGMLQuantizationType(kind)
        block, size = GGML_QUANT_SIZES[quantised]
        wanted, odd = divmod(math.prod(shape) * size, block)
        raw = data[start + offset :][:wanted]
        if odd or len(raw) != wanted:
            raise FormatError(f"{file} ends amid its tensor {name!r}")
        values = dequantize(raw.reshape(*shape[:-1], -1), quantised)
        found[name] = torch.from_numpy(np.require(values, requirements=["W", "E"]))  # float32 is the file itself
    return known, found


class Header:
    """Reads numbers, strings and arrays one after the other."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        """Little-endian numbers without gaps, by their letters in `struct`."""
        found = struct.unpack_from(f"<{kinds}", self.data, self.at)
        self.at += struct.calcsize(f"<{kinds}")
        return found

    def string(self) -> str:
        """A length of 8 bytes, and UTF-8."""
        (size,) = self.numbers("Q")
        self.at += size
        return str(self.data[self.at - size : self.at], "utf-8")

    def value(self, kind: int) -> Any:
        """A number, a string or an array of either."""
        if kind == 8:
            return self.string()
        if kind != 9:
            return self.numbers(NUMBERS[kind])[0]
        inner, size = self.numbers("IQ")
        return [self.value(inner) for _ in range(size)] if inner in (8, 9) else self.numbers(NUMBERS[inner] * size)
