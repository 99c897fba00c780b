"""Folders that SAELens 6 loads, written from every cell that has an equivalent there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saehooks.errors import FormatError
from saehooks.sae import SparseCoder
from saehooks.storage import write_folder

VERSION = "6.54.0"
"""The SAELens version named in written folders; its loader drops nested metadata without one of 6 or later."""

KINDS = {
    "relu": "standard",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "mutual_choice": "jumprelu",
    "feature_choice": "jumprelu",
}
"""Their architecture for each of our activations; those that learn a threshold are evaluated by it."""

ROW_NORMS = {None: "none", "layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}


def save(sae: SparseCoder, folder: str | Path) -> None:
    """Write a folder that SAELens 6 loads: the same codes and reconstructions as in eval mode.

    Raises:
        FormatError: an SAE that SAELens has no architecture for, saying why. Nothing is written.
    """
    kind = _architecture(sae)
    tensors, settings = _contents(sae, kind)
    d, metadata = sae.dictionary, sae.cfg.metadata
    joined = (sae.hook_name or "").endswith("hook_z") and metadata.get("head") is None
    config = {
        "architecture": kind,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.dtype)[6:],
        "device": "cpu",
        "apply_b_dec_to_input": d.apply_b_dec_to_input,
        "normalize_activations": ROW_NORMS[d.row_norm],
        "reshape_activations": "hook_z" if joined and not kind.endswith("transcoder") else "none",
        **settings,
        "metadata": _metadata(sae),
    }
    with torch.no_grad():
        write_folder(folder, config, {name: tensor.detach().contiguous() for name, tensor in tensors.items()})


def _architecture(sae: SparseCoder) -> str:
    activation, instead = sae.cfg.activation, "Save it as our own folder instead: sae.save(folder)"
    if sae.cfg.dictionary != "linear" or activation not in KINDS:
        raise FormatError(
            f"SAELens has no architecture for {sae.cfg.dictionary} x {activation}; it takes linear with "
            f"{', '.join(KINDS)}. {instead}, or attach SAELens' tools to it with saehooks.formats.saelens_plugin"
        )
    if getattr(sae.refinement, "steps", 0):
        raise FormatError(f"SAELens does not refine codes, this SAE does (refine={sae.refinement.steps}). {instead}")
    silenced = sae.density.silenced
    if silenced is not None and bool(silenced.any()):
        raise FormatError(f"SAELens silences no latents, this SAE does (max_density). {instead}")
    negative = getattr(sae.activation, "negative", "drop")
    if negative == "value":
        raise FormatError(f"SAELens has no top-k of scores whatever their sign (negative='value'). {instead}")
    kind = "abstopk" if negative == "magnitude" else KINDS[activation]
    if "d_out" not in sae.cfg.settings:
        return kind
    if kind not in ("standard", "jumprelu"):
        raise FormatError(f"SAELens has transcoders of relu and jumprelu, not of {activation}. {instead}")
    words = ["jumprelu"] * (kind == "jumprelu") + ["skip"] * (sae.dictionary.W_skip is not None) + ["transcoder"]
    return "_".join(words)


def _contents(sae: SparseCoder, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by their names, and the settings of the architecture."""
    d, a = sae.dictionary, sae.activation
    tensors: dict[str, Tensor] = {"W_enc": d.W_enc, "W_dec": d.W_dec, "b_enc": d.b_enc, "b_dec": d.b_dec}
    settings: dict[str, Any] = {}
    if d.normalize:  # decoding gives the unit back, so it folds into the two tables
        tensors |= {"W_enc": d.W_enc / d.unit, "W_dec": d.W_dec * d.unit}
    if kind == "gated":
        bias = tensors.pop("b_enc")  # they have none: it moves into the two biases behind it
        tensors |= {"b_gate": a.b_gate + bias, "b_mag": a.b_mag + a.r_mag.exp() * bias, "r_mag": a.r_mag}
    elif kind.startswith("jumprelu"):
        tensors["threshold"] = _threshold(sae)
    elif kind in ("topk", "abstopk"):
        settings = {"k": a.k, "rescale_acts_by_decoder_norm": False}
    if kind.endswith("transcoder"):
        settings["d_out"] = sae.d_out
        if d.W_skip is not None:
            tensors["W_skip"] = d.W_skip
    return tensors, settings


def _threshold(sae: SparseCoder) -> Tensor:
    """(d_sae,) what a score must exceed in eval mode."""
    if sae.cfg.activation == "jumprelu":
        return sae.activation.theta
    was = sae.activation.training
    try:
        sae.activation.training = False
        theta = torch.as_tensor(sae.activation.rule().theta, device=sae.device)
    finally:
        sae.activation.training = was
    return theta.clamp(min=0).to(sae.dtype).expand(sae.d_sae)


def _metadata(sae: SparseCoder) -> dict[str, Any]:
    known = sae.cfg.metadata
    processing = known.get("processing") or {}
    names = {"centered": "center_writing_weights", "folded": "fold_ln"}
    kwargs = {theirs: processing[ours] for ours, theirs in names.items() if isinstance(processing.get(ours), bool)}
    metadata = {
        "sae_lens_version": VERSION,
        "hook_name": sae.hook_name,
        "hook_head_index": known.get("head"),
        "model_name": known.get("model_name"),
    }
    if (known.get("training") or {}).get("positions") == "all but the first":
        metadata["seqpos_slice"] = [1, None]
    if kwargs:
        metadata["model_from_pretrained_kwargs"] = kwargs
    if "d_out" in sae.cfg.settings:
        metadata["hook_name_out"] = sae.hook_name_out
    return metadata
