"""Autoencoders of OpenAI's sparse_autoencoder (GPT-2 small): one pickled state dict, read without running it.

Top-k ones normalise each input by its own mean and standard deviation, and undo that behind the decoder; ReLU ones do
not. Source: ``sparse_autoencoder/model.py`` and ``paths.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from saehooks.formats._linear import LinearParts, build_linear
from saehooks.formats.contents import Contents
from saehooks.sae import SparseCoder

SITES = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_post_mlp": "hook_resid_post",
}
"""TransformerLens' names of the places in their paths."""


def is_one(state: Any) -> bool:
    """Whether a state dict is one of theirs."""
    return isinstance(state, dict) and "latent_bias" in state and "pre_bias" in state


def read(
    state: Mapping[str, Any],
    where: str,
    *,
    hook_name: str | None = None,
    ignore: Iterable[str] = (),
    name: str = "",
) -> SparseCoder:
    """The SAE of such a state dict; its path, ``.../resid_post_mlp_v5_32k/autoencoders/8.pt``, says the site."""
    facts = {key: value for key, value in state.items() if key in ("activation", "activation_state_dict")}
    contents = Contents(where, facts, {key: value for key, value in state.items() if key not in facts}, ignore)
    kind = contents.one_of("activation", ("ReLU", "TopK"), "ReLU")
    inner = Contents(where, contents.group("activation_state_dict", {}), ignore=ignore)
    settings: dict[str, Any] = {}
    if kind == "TopK":
        inner.one_of("postact_fn", ("ReLU",))
        settings = {"k": inner.setting("k", int), "row_norm": "layer_norm"}
    inner.finish()
    contents.skip("stats_last_nonzero latents_activation_frequency latents_mean_square")
    parts = LinearParts(
        W_enc=contents.tensor("encoder.weight", "d_sae", "d_in"),
        W_dec=contents.tensor("decoder.weight", "d_in", "d_sae"),
        b_enc=contents.tensor("latent_bias", "d_sae"),
        b_dec=contents.tensor("pre_bias", "d_in"),
        encoder_rows=True,
        decoder_columns=True,
        settings=settings,
    )
    found = re.search(r"(mlp_post_act|resid_(?:delta|post)_(?:mlp|attn))\w*/autoencoders/(\d+)\.pt", name)
    metadata = {
        "hook_name": hook_name or (f"blocks.{found[2]}.{SITES[found[1]]}" if found else None),
        "model_name": "gpt2" if found else None,
        "source": {"format": "openai", "activation": kind},
    }
    return build_linear(contents, "topk" if kind == "TopK" else "relu", parts, metadata)
