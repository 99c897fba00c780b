"""SAEs of SAELens 6: a folder of ``cfg.json`` and ``sae_weights.safetensors``, read and written.

Read are the architectures standard, gated, jumprelu and topk (its decoder-norm rescaling is folded into the weights,
which changes no output). SAELens saves batchtopk as jumprelu, and so does `save`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saehooks.errors import FormatError
from saehooks.formats._linear import linear_sae, need
from saehooks.sae import SAE
from saehooks.storage import CONFIG, WEIGHTS, read_json, read_safetensors, write_folder

VERSION = "6.54.0"
"""The SAELens version named in written folders; its loader drops nested metadata without one of 6 or later."""

ARCHITECTURES = {"standard": "relu", "gated": "gated", "jumprelu": "jumprelu", "topk": "topk"}


def load(folder: str | Path) -> SAE:
    """Load an SAELens folder: the same codes and reconstructions.

    Raises:
        FormatError: not such a folder, or an architecture or normalisation that cannot be carried over exactly.
    """
    folder = Path(folder)
    cfg = read_json(folder / CONFIG)
    tensors, _ = read_safetensors(folder / WEIGHTS)
    where = str(folder)
    kind = cfg.get("architecture", "standard")
    if kind not in ARCHITECTURES:
        raise FormatError(f"{where}: architecture {kind!r}; what can be read: {', '.join(ARCHITECTURES)}")
    for name in ("normalize_activations", "reshape_activations"):
        if cfg.get(name, "none") not in ("none", None):
            raise FormatError(f"{where}: {name}={cfg[name]!r} is not carried over; fold it into the weights first")
    W_enc, W_dec, b_dec = need(tensors, ("W_enc", "W_dec", "b_dec"), where)
    settings: dict[str, Any] = {"apply_b_dec_to_input": bool(cfg.get("apply_b_dec_to_input", True))}
    named = {"dictionary.W_enc": W_enc, "dictionary.W_dec": W_dec, "dictionary.b_dec": b_dec}
    if kind == "gated":
        found = need(tensors, ("b_gate", "b_mag", "r_mag"), where)
        named |= {f"activation.{n}": t for n, t in zip(("b_gate", "b_mag", "r_mag"), found, strict=True)}
    else:
        (named["dictionary.b_enc"],) = need(tensors, ("b_enc",), where)
    if kind == "jumprelu":
        named["activation.log_theta"] = need(tensors, ("threshold",), where)[0].clamp(min=0).log()
    if kind == "topk":
        settings["k"] = int(need(cfg, ("k",), where)[0])
        if cfg.get("rescale_acts_by_decoder_norm"):
            norm = W_dec.norm(dim=1)
            named["dictionary.W_enc"], named["dictionary.W_dec"] = W_enc * norm, W_dec / norm[:, None]
            named["dictionary.b_enc"] = named["dictionary.b_enc"] * norm
    more = cfg.get("metadata") or {}
    site = more.get("hook_name", cfg.get("hook_name"))
    metadata = {
        "hook_name": site,
        "head": more.get("hook_head_index", cfg.get("hook_head_index")),
        "model_name": more.get("model_name", cfg.get("model_name")),
        "source": {"format": "saelens", "architecture": kind},
    }
    return linear_sae(where, ARCHITECTURES[kind], named, metadata, **settings)


def save(sae: SAE, folder: str | Path) -> None:
    """Write a folder that SAELens 6 loads.

    Raises:
        FormatError: an SAE that SAELens has no architecture for.
    """
    if sae.cfg.dictionary != "linear" or sae.cfg.activation not in ("relu", "gated", "jumprelu", "topk", "batchtopk"):
        raise FormatError(
            f"SAELens has no architecture for {sae.cfg.dictionary} x {sae.cfg.activation}; it takes linear with relu, "
            "gated, jumprelu, topk or batchtopk. Save it as our own folder instead: sae.save(folder)"
        )
    d, a = sae.dictionary, sae.activation
    tensors: dict[str, Tensor] = {"W_enc": d.W_enc, "W_dec": d.W_dec, "b_enc": d.b_enc, "b_dec": d.b_dec}
    if d.normalize:  # decoding gives the unit back, so it folds into the two tables
        tensors |= {"W_enc": d.W_enc / d.unit, "W_dec": d.W_dec * d.unit}
    kind, cfg = sae.cfg.activation, {}
    if kind == "gated":
        bias = tensors.pop("b_enc")  # they have none: it moves into the two biases behind it
        tensors |= {"b_gate": a.b_gate + bias, "b_mag": a.b_mag + a.r_mag.exp() * bias, "r_mag": a.r_mag}
    elif kind == "jumprelu":
        tensors["threshold"] = a.theta
    elif kind == "batchtopk":
        tensors["threshold"] = a.threshold.clamp(min=0).expand(sae.d_sae)
    elif kind == "topk":
        cfg = {"k": a.k, "rescale_acts_by_decoder_norm": False}
    architecture = {"relu": "standard", "batchtopk": "jumprelu"}.get(kind, kind)
    config = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.dtype)[6:],
        "device": "cpu",
        "apply_b_dec_to_input": d.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **cfg,
        "metadata": {
            "sae_lens_version": VERSION,
            "hook_name": sae.hook_name,
            "hook_head_index": sae.cfg.metadata.get("head"),
            "model_name": sae.cfg.metadata.get("model_name"),
        },
    }
    with torch.no_grad():
        write_folder(folder, config, {name: tensor.detach().clone() for name, tensor in tensors.items()})
