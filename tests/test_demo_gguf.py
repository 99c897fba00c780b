"""The reader of the packaged language model's file, beside transformers' own."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from saehooks.errors import FormatError

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers", minversion="5.9")

SHAPES = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
SHAPES |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}


def written(file: Path, architecture: str = "llama", tied: bool = True, more: str = "", scaled: bool = False) -> Path:
    """A GGUF file by the gguf package: two layers of four heads over two, in four and eight bits, and float32."""
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(50_000.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    if scaled:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_vocab_size(96)
    writer.add_token_list([f"t{i}" for i in range(96)])
    writer.add_token_types([1] * 96)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType | None = None):
        values = draw.normal(0, 0.2, shape).astype(np.float32)
        data = values if kind is None else gguf.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    kinds = gguf.GGMLQuantizationType
    add("token_embd.weight", (96, 64), kinds.Q8_0)
    add("output_norm.weight", (64,))
    if not tied:
        add("output.weight", (96, 64), kinds.F16)
    for layer in range(2):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{norm}.weight", (64,))
        for name, shape in SHAPES.items():
            add(f"blk.{layer}.{name}.weight", shape, kinds.Q4_1)
    if more:
        add(more, (64,))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_gives_the_model_that_transformers_makes_of_it(tmp_path, tied):
    """Every weight bit for bit, what it is built of, and the logits."""
    from saehooks.demo.gguf import llama

    file = written(tmp_path / "tiny.gguf", tied=tied)
    ours = llama(file)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=file.name).eval()
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())
    assert not ours.training
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    apart = {"_name_or_path", "_model_name_or_path", "quantization_config", "dtype"}  # where from, how stored
    facts, known = ours.config.to_dict(), theirs.config.to_dict()
    assert {k: v for k, v in facts.items() if k not in apart} == {k: v for k, v in known.items() if k not in apart}
    tokens = torch.randint(0, 96, (2, 11))
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_files_of_another_kind_are_refused(tmp_path):
    """Another architecture, another tensor, another format, scaled positions, a file that was cut short."""
    from saehooks.demo.gguf import llama

    with pytest.raises(FormatError, match="holds a 'gpt2', not a 'llama'"):
        llama(written(tmp_path / "a.gguf", architecture="gpt2"))
    with pytest.raises(FormatError, match=r"no tensor 'blk\.0\.attn_q_norm\.weight'"):
        llama(written(tmp_path / "b.gguf", more="blk.0.attn_q_norm.weight"))
    other = tmp_path / "c.gguf"
    other.write_bytes(b"PK\3\4" + bytes(60))
    with pytest.raises(FormatError, match="not a GGUF file of version 2 or 3"):
        llama(other)
    with pytest.raises(FormatError, match="scales its rotary embeddings"):
        llama(written(tmp_path / "e.gguf", scaled=True))
    cut = written(tmp_path / "f.gguf")
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"ends amid its tensor 'blk\.1"):
        llama(cut)
    short = tmp_path / "d.gguf"
    short.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 5))
    with pytest.raises(FormatError, match="ends amid its header"):
        llama(short)
