"""Gemma Scope 1 and 2: the five arrays of a JumpReLU SAE or transcoder, which have the same names in both.

Gemma Scope 1 is ``params.npz`` in a folder whose path alone says what it is; Gemma Scope 2 is ``params.safetensors``
with a ``config.json``. Their thresholds are kept as they are.
Source: arXiv:2408.05147; the notebook of the release; SAELens 6.54 ``pretrained_sae_loaders.py`` for Gemma Scope 2.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saehooks.errors import FormatError
from saehooks.formats._linear import LinearParts, build_linear
from saehooks.formats.archives import open_npz
from saehooks.formats.contents import Contents
from saehooks.formats.names import layer_in
from saehooks.sae import SparseCoder
from saehooks.storage import StoredTensor, open_safetensors, read_json

WEIGHTS, WEIGHTS_2, CONFIG_2 = "params.npz", "params.safetensors", "config.json"
KINDS = {"transcoder": "transcoder", "res": "resid_post", "mlp": "mlp_out", "att": "attn", "embedding": "embedding"}
SITES = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn": "attn.hook_z"}


def load(
    path: str | Path, *, hook_name: str | None = None, ignore: Iterable[str] = (), name: str | None = None
) -> SparseCoder:
    """Load a Gemma Scope SAE or transcoder: the same codes and reconstructions.

    Args:
        path: holds params.npz, or that file itself; or a folder of params.safetensors and config.json.
        hook_name: its site, where the path does not say it.
        ignore: settings or arrays that you know to change nothing.
        name: where it came from, such as ``google/gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_59``, which says
            what it is; the path if not given.
    Raises:
        FormatError: no such file, or something in it that is not understood. Pickled arrays are never opened.
    """
    path = Path(path)
    name = name or str(path.resolve())
    if path.is_dir() and (path / WEIGHTS_2).is_file() and not (path / WEIGHTS).is_file():
        return _load_2(path, hook_name, ignore, name)
    file = path / WEIGHTS if path.is_dir() else path
    arrays = {array.lower(): stored for array, stored in open_npz(file).items()}
    contents = Contents(str(path), {}, arrays, ignore)
    kind, layer = _kind(name), layer_in(name)
    if kind is None:
        warnings.warn(
            f"{path}: nothing in its path says whether these arrays are of an SAE or of a transcoder, which have the "
            "same names: it is read as an SAE. Keep the folder's name, such as gemma-scope-2b-pt-res/layer_3/...",
            stacklevel=3,
        )
    parts = _parts(contents, transcodes=kind == "transcoder")
    size = re.search(r"gemma-scope-(\d+b)-(pt|it)", name)
    metadata: dict[str, Any] = {
        "hook_name": hook_name or _site(kind, layer),
        "model_name": f"gemma-2-{size[1]}{'-it' if size[2] == 'it' else ''}" if size else None,
        "source": {"format": "gemma_scope"},
    }
    if kind == "transcoder" and layer is not None:
        metadata["hook_name"] = hook_name or f"blocks.{layer}.ln2.hook_normalized"
        metadata["hook_name_out"] = f"blocks.{layer}.hook_mlp_out"

    def unscale(read: dict[str, Tensor]) -> None:  # trained on embeddings times sqrt(d_model)
        factor = len(read["dictionary.b_dec"]) ** 0.5
        read["dictionary.W_enc"], read["dictionary.W_dec"] = (
            read["dictionary.W_enc"] / factor,
            read["dictionary.W_dec"] * factor,
        )

    return build_linear(contents, "jumprelu", parts, metadata, fold=unscale if kind == "embedding" else None)


def _kind(name: str) -> str | None:
    """What a path says the SAE is of."""
    if "embedding" in name.rsplit("gemma-scope", 1)[-1]:
        return "embedding"
    found = re.search(r"(?:^|[-_/])(transcoder|res|mlp|att)(?:s|id)?(?:[-_/]|$)", name)
    return KINDS[found[1]] if found else None


def _site(kind: str | None, layer: int | None) -> str | None:
    if kind == "embedding":
        return "hook_embed"
    return f"blocks.{layer}.{SITES[kind]}" if kind in SITES and layer is not None else None


def _parts(contents: Contents, transcodes: bool) -> LinearParts:
    out = "d_out" if transcodes else "d_in"
    parts = LinearParts(
        W_enc=contents.tensor("w_enc", "d_in", "d_sae"),
        W_dec=contents.tensor("w_dec", "d_sae", out),
        b_enc=contents.tensor("b_enc", "d_sae"),
        b_dec=contents.tensor("b_dec", out),
        threshold=contents.tensor("threshold", "d_sae"),
        settings={"apply_b_dec_to_input": False},
    )
    if transcodes:
        parts.settings = {"d_out": parts.W_dec.shape[1]}
    return parts


# --------------------------------------------------------------- Gemma Scope 2


def _load_2(folder: Path, hook_name: str | None, ignore: Iterable[str], name: str) -> SparseCoder:
    config = read_json(folder / CONFIG_2) if (folder / CONFIG_2).is_file() else _config_of(name)
    return read_2(config, open_safetensors(folder / WEIGHTS_2).tensors, str(folder), hook_name, ignore, name)


def _config_of(name: str) -> dict[str, Any]:
    """What the path says where a release has no config.json."""
    kind = next((word for word in ("transcoder", "resid_post", "attn_out", "mlp_out") if word in name), None)
    layer = layer_in(name)
    if kind is None or layer is None:
        raise FormatError(f"{name}: no {CONFIG_2}, and its path does not say what it is")
    places = {
        "transcoder": "pre_feedforward_layernorm.output",
        "resid_post": "output",
        "attn_out": "self_attn.o_proj.input",
        "mlp_out": "post_feedforward_layernorm.output",
    }
    config = {"architecture": "jump_relu", "hf_hook_point_in": f"model.layers.{layer}.{places[kind]}"}
    if kind == "transcoder":
        config["hf_hook_point_out"] = f"model.layers.{layer}.post_feedforward_layernorm.output"
    return config


def read_2(
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    where: str,
    hook_name: str | None = None,
    ignore: Iterable[str] = (),
    name: str = "",
) -> SparseCoder:
    """The SAE or transcoder of such a config and such tensors."""
    contents = Contents(where, config, {key.lower(): tensor for key, tensor in tensors.items()}, ignore)
    contents.one_of("architecture", ("jump_relu",))
    place, out = contents.setting("hf_hook_point_in", str), contents.setting("hf_hook_point_out", str, None)
    kind = contents.one_of("type", ("sae", "transcoder"), None)
    transcodes = out is not None and out != place
    if kind is not None and (kind == "transcoder") != transcodes:
        raise FormatError(f"{where}: type={kind!r}, but it reads {place} and writes {out or place}")
    affine = contents.setting("affine_connection", bool, False)
    width = contents.setting("width", int, None)
    if width is not None:
        contents.size("d_sae", width, f"width in {CONFIG_2}")
    model = contents.setting("model_name", str, None)
    contents.known("l0 layer site")
    parts = _parts(contents, transcodes)
    if affine:
        if not transcodes:
            raise FormatError(f"{where}: affine_connection is set, but it reads and writes one place, {place}")
        stored = contents.tensor("affine_skip_connection", "d_in", "d_out")
        turned = StoredTensor(stored.shape[::-1], stored.dtype, lambda: stored.read().T)
        parts.W_skip, parts.settings["skip"] = turned, True
    metadata = {
        "hook_name": hook_name or _site_of_place(place),
        "hook_name_out": _site_of_place(out) if transcodes and out else None,
        "model_name": model.replace("-v3", "-3") if model else None,
        "source": {"format": "gemma_scope_2", "hf_hook_point_in": place, "hf_hook_point_out": out, "name": name},
    }
    return build_linear(contents, "jumprelu", parts, metadata)


PLACES = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
}


def _site_of_place(place: str) -> str | None:
    found = re.fullmatch(r"(?:\w+\.)*layers\.(\d+)\.(.+)", place)
    return f"blocks.{found[1]}.{PLACES[found[2]]}" if found and found[2] in PLACES else None
