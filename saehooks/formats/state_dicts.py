"""State dicts of a few publishers, whose files hold tensors and no config: what they are follows from their names.

Goodfire, DeepSeek-R1 (qresearch), Qwen Scope, the attention SAEs of Kissane et al., and the transcoders of
circuit-tracer (mwhanna). Source: SAELens 6.54, ``loading/pretrained_sae_loaders.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from saehooks.errors import FormatError
from saehooks.formats._linear import LinearParts, build_linear
from saehooks.formats.contents import Contents
from saehooks.formats.names import block_site, layer_in
from saehooks.sae import SparseCoder

HOOK_Z_TRAINING = """
    anthropic_neuron_resample_scale anthropic_resample_batches batch_size beta beta1 beta2 buffer_batches buffer_mult
    buffer_size checkpoint_interval concat_heads d_head dataset dead_direction_cutoff device dict_mult enc_dtype head
    l1_coeff layer lr model_batch_size model_name n_heads name neuron_resample_scale num_resamples num_tokens
    re_init_every remove_rare_dir resample_factor resample_interval resample_scheme save_dir seed seq_len site version
    wandb_entity wandb_project
"""


def read_linear_layers(
    state: Mapping[str, Any], where: str, *, hook_name: str | None = None, ignore: Iterable[str] = (), name: str = ""
) -> SparseCoder:
    """A ReLU SAE of two linear layers with biases, of which none is taken off the input (Goodfire, DeepSeek-R1)."""
    contents = Contents(where, {}, state, ignore)
    prefix = "_linear" if "encoder_linear.weight" in state else ""
    parts = LinearParts(
        W_enc=contents.tensor(f"encoder{prefix}.weight", "d_sae", "d_in"),
        b_enc=contents.tensor(f"encoder{prefix}.bias", "d_sae"),
        W_dec=contents.tensor(f"decoder{prefix}.weight", "d_in", "d_sae"),
        b_dec=contents.tensor(f"decoder{prefix}.bias", "d_in"),
        encoder_rows=True,
        decoder_columns=True,
        settings={"apply_b_dec_to_input": False},
    )
    found = re.search(r"-l(\d+)(?:\.\w+)?$", name)
    site = block_site(int(found[1]), "resid_post") if found else None
    return build_linear(contents, "relu", parts, {"hook_name": hook_name or site, "source": {"format": "linear"}})


def is_linear_layers(state: Any) -> bool:
    """Whether these are the tensors of `read_linear_layers`."""
    return isinstance(state, dict) and "encoder_linear.weight" in state and "decoder_linear.bias" in state


def read_qwen_scope(
    state: Mapping[str, Any], where: str, *, hook_name: str | None = None, ignore: Iterable[str] = (), name: str = ""
) -> SparseCoder:
    """A TopK SAE of Qwen Scope: ``Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer0.sae.pt`` says its k and its site."""
    found = re.search(r"SAE-Res-(.+)-W(\d+)K-L0_(\d+)", name)
    layer = re.search(r"layer(\d+)\.sae\.pt$", name)
    if found is None or layer is None:
        raise FormatError(
            f"{where}: its k stands in the names of its repository and file alone, as in "
            "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer0.sae.pt: keep them, or load it by repository"
        )
    contents = Contents(where, {}, state, ignore)
    contents.size("d_sae", int(found[2]) * 1024, "the width in the repository's name")
    parts = LinearParts(
        W_enc=contents.tensor("W_enc", "d_sae", "d_in"),
        b_enc=contents.tensor("b_enc", "d_sae"),
        W_dec=contents.tensor("W_dec", "d_in", "d_sae"),
        b_dec=contents.tensor("b_dec", "d_in"),
        encoder_rows=True,
        decoder_columns=True,
        settings={"k": int(found[3]), "apply_b_dec_to_input": False},
    )
    metadata = {
        "hook_name": hook_name or block_site(int(layer[1]), "resid_post"),
        "model_name": found[1],
        "source": {"format": "qwen_scope"},
    }
    return build_linear(contents, "topk", parts, metadata)


def read_hook_z(
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    where: str,
    *,
    hook_name: str | None = None,
    ignore: Iterable[str] = (),
) -> SparseCoder:
    """A ReLU SAE on joined attention heads, with a config of ``act_size``, ``dict_size`` and ``act_name``."""
    contents = Contents(where, config, state, ignore)
    contents.size("d_in", contents.setting("act_size", int), "act_size in the config")
    contents.size("d_sae", contents.setting("dict_size", int), "dict_size in the config")
    site = contents.setting("act_name", str)
    contents.known(HOOK_Z_TRAINING)
    parts = LinearParts(
        W_enc=contents.tensor("W_enc", "d_in", "d_sae"),
        b_enc=contents.tensor("b_enc", "d_sae"),
        W_dec=contents.tensor("W_dec", "d_sae", "d_in"),
        b_dec=contents.tensor("b_dec", "d_in"),
        settings={"apply_b_dec_to_input": True},
    )
    site = re.sub(r"^(blocks\.\d+)\.hook_z$", r"\1.attn.hook_z", site)
    metadata = {"hook_name": hook_name or site, "source": {"format": "hook_z"}}
    return build_linear(contents, "relu", parts, metadata)


def read_circuit_tracer(
    state: Mapping[str, Any],
    where: str,
    *,
    hook_name: str | None = None,
    ignore: Iterable[str] = (),
    name: str = "",
    model_name: str | None = None,
) -> SparseCoder:
    """A ReLU transcoder of an MLP: ``layer_3.safetensors``, with an encoder of rows and perhaps a skip connection."""
    contents = Contents(where, {}, state, ignore)
    parts = LinearParts(
        W_enc=contents.tensor("W_enc", "d_sae", "d_in"),
        b_enc=contents.tensor("b_enc", "d_sae"),
        W_dec=contents.tensor("W_dec", "d_sae", "d_out"),
        b_dec=contents.tensor("b_dec", "d_out"),
        encoder_rows=True,
    )
    parts.settings["d_out"] = parts.W_dec.shape[1]
    if contents.holds("W_skip"):
        parts.W_skip, parts.settings["skip"] = contents.tensor("W_skip", "d_out", "d_in"), True
    layer = layer_in(name)
    metadata = {
        "hook_name": hook_name or (f"blocks.{layer}.mlp.hook_in" if layer is not None else None),
        "hook_name_out": f"blocks.{layer}.hook_mlp_out" if layer is not None else None,
        "model_name": model_name,
        "source": {"format": "circuit_tracer"},
    }
    return build_linear(contents, "relu", parts, metadata)
