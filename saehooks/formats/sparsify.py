"""SAEs and transcoders of EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors``, top-k with a linear encoder.

A transcoder reads its module's input and predicts the output; a skip connection adds a linear map of that input.
Source: ``sparsify/sparse_coder.py`` and ``config.py``, versions 1.0 to 1.3.3 and the experimental settings after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from saehooks.formats._linear import LinearParts, build_linear
from saehooks.formats.contents import Contents
from saehooks.formats.names import site_of_module
from saehooks.sae import SparseCoder
from saehooks.storage import CONFIG, open_safetensors, read_json

WEIGHTS = "sae.safetensors"


def load(folder: str | Path, *, hook_name: str | None = None, ignore: Iterable[str] = ()) -> SparseCoder:
    """Load a sparsify folder: the same codes and reconstructions.

    Args:
        folder: holds cfg.json and sae.safetensors; its name, such as ``layers.5.mlp``, says the site.
        hook_name: the site, where the folder's name does not say it.
        ignore: settings or tensors that you know to change nothing.
    Raises:
        FormatError: not such a folder, or something in it that is not understood.
    """
    folder = Path(folder)
    stored = open_safetensors(folder / WEIGHTS).tensors
    contents = Contents(str(folder), read_json(folder / CONFIG), stored, ignore)
    contents.one_of("activation", ("topk",), "topk")
    transcodes, skips = (contents.setting(name, bool, False) for name in ("transcode", "skip_connection"))
    settings: dict[str, Any] = {"k": contents.setting("k", int)}
    if contents.setting("signed", bool, False):
        settings["negative"] = "magnitude"
    contents.neutral(embed_skip=False, gram_lookup=False, remove_transcoder_bias=False)
    contents.known("normalize_decoder multi_topk lookup_max_order")  # of the training
    d_in, expansion = contents.setting("d_in", int, None), contents.setting("expansion_factor", int, None)
    d_sae = contents.setting("num_latents", int, 0) or (d_in * expansion if d_in and expansion else 0)
    if d_in is not None:
        contents.size("d_in", d_in, "d_in in the config")
    if d_sae:
        contents.size("d_sae", d_sae, "the number of latents in the config")
    out = "d_out" if transcodes else "d_in"
    parts = LinearParts(
        W_enc=contents.tensor("encoder.weight", "d_sae", "d_in"),
        b_enc=contents.tensor("encoder.bias", "d_sae"),
        W_dec=contents.tensor("W_dec", "d_sae", out),
        b_dec=contents.tensor("b_dec", out),
        encoder_rows=True,
        settings=settings,
    )
    if skips:
        parts.W_skip, settings["skip"] = contents.tensor("W_skip", out, "d_in"), True
    if transcodes or skips:
        settings["d_out"] = parts.W_dec.shape[1]
    else:
        settings["apply_b_dec_to_input"] = True
    metadata = _sites(folder, hook_name, transcodes) | {"source": {"format": "sparsify", "transcode": transcodes}}
    return build_linear(contents, "topk", parts, metadata, fold=None if transcodes or not skips else _centre)


def _centre(read: dict[str, Tensor]) -> None:
    """An autoencoder with a skip connection takes b_dec off its encoder's input: that goes into the bias."""
    read["dictionary.b_enc"] = read["dictionary.b_enc"] - read["dictionary.b_dec"] @ read["dictionary.W_enc"]


def _sites(folder: Path, hook_name: str | None, transcodes: bool) -> dict[str, Any]:
    """The sites that the folder is named after, in TransformerLens' words."""
    output = site_of_module(folder.name)
    if not transcodes:
        return {"hook_name": hook_name or output, "hook_name_out": None}
    is_mlp = output is not None and output.endswith("hook_mlp_out")
    read = output.replace("hook_mlp_out", "mlp.hook_in") if output is not None and is_mlp else None
    return {"hook_name": hook_name or read, "hook_name_out": output}
