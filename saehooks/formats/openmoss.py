"""SAEs and transcoders of OpenMOSS' Language-Model-SAEs (Llama Scope): a config and safetensors in one of two layouts.

Llama Scope is ``hyperparams.json`` with ``checkpoints/final.safetensors`` and one threshold for all latents; later ones
are ``config.json`` with ``sae_weights.safetensors`` and a threshold for each. Activations were scaled to norm
sqrt(d_model) on average over the dataset; the factors stand in the file and are folded into the weights. Codes are
those of the scaled activations, as the authors' and SAELens' ``encode`` gives them.
Source: ``lm_saes/sae.py`` (``encode``, ``standardize_parameters_of_dataset_norm``) and ``config.py``; SAELens 6.54.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saehooks.errors import FormatError
from saehooks.formats._linear import LinearParts, build_linear, exponential, scale_by_decoder_norm
from saehooks.formats.contents import Contents
from saehooks.sae import SparseCoder
from saehooks.storage import StoredTensor, open_safetensors, read_json

HYPERPARAMETERS, CONFIG, WEIGHTS = "hyperparams.json", "config.json", "sae_weights.safetensors"
CHECKPOINTS = ("checkpoints/pruned.safetensors", "checkpoints/final.safetensors")
NORM = "dataset_average_activation_norm"
TRAINING = """
    decoder_bias_init_method decoder_exactly_fixed_norm device dtype exp_name force_unit_decoder_norm
    init_decoder_norm init_encoder_bias_with_mean_hidden_pre init_encoder_norm init_encoder_with_decoder_transpose
    jumprelu_threshold_grad_scale jumprelu_threshold_window l1_coefficient l1_coefficient_warmup_steps lp
    promote_act_fn_dtype sae_pretrained_name_or_path seed sparsity_threshold_for_triton_spmm_kernel strict_loading top_k
    use_batch_norm_mse use_ghost_grads use_triton_kernel
"""


def load(
    folder: str | Path,
    *,
    hook_name: str | None = None,
    ignore: Iterable[str] = (),
    input_scale: float | None = None,
) -> SparseCoder:
    """Load such a folder: the same codes and reconstructions.

    Args:
        folder: holds hyperparams.json or config.json, and the weights.
        hook_name: its site, in place of the one that the config names.
        ignore: settings or tensors that you know to change nothing.
        input_scale: sqrt(d_model) / mean norm of the activations, where the file does not hold that norm.
    Raises:
        FormatError: not such a folder, or something in it that is not understood.
    """
    folder = Path(folder)
    names = (WEIGHTS, *CHECKPOINTS)
    file = next((folder / name for name in names if (folder / name).is_file()), folder / WEIGHTS)
    config = folder / HYPERPARAMETERS
    config = config if config.is_file() else folder / CONFIG
    return read(read_json(config), open_safetensors(file).tensors, str(folder), hook_name, ignore, input_scale)


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    where: str,
    hook_name: str | None = None,
    ignore: Iterable[str] = (),
    input_scale: float | None = None,
) -> SparseCoder:
    """The SAE or transcoder of such a config and such tensors."""
    contents = Contents(where, config, tensors, ignore)
    contents.one_of("sae_type", ("sae",), "sae")
    contents.neutral(use_glu_encoder=False)
    place = contents.setting("hook_point_in", str)
    out = contents.setting("hook_point_out", str, place)
    activation = contents.one_of("act_fn", ("relu", "jumprelu", "topk"), "relu")
    scored_by_norm = contents.setting("sparsity_include_decoder_norm", bool, True)
    scale_in, scale_out, row_norm = _scales(contents, place, out, input_scale)
    parts = _parts(contents, activation, transcodes=out != place)
    if row_norm is not None:
        parts.settings["row_norm"] = row_norm
    if activation == "topk":
        parts.settings["k"] = contents.setting("top_k", int)
    one_threshold = contents.setting("jump_relu_threshold", float, None)
    if activation == "jumprelu" and parts.threshold is None:
        if one_threshold is None:
            raise FormatError(f"{where}: neither its tensors nor its config hold the threshold of its jumprelu")
        parts.threshold = float(one_threshold) * scale_out  # it is meant for what is written back, unscaled
    facts = {name: value for name, value in contents.known(TRAINING).items() if value is not None}

    def fold(read: dict[str, Tensor]) -> None:
        if scored_by_norm and activation == "jumprelu":
            norm = read["dictionary.W_dec"].norm(dim=1)
            read["activation.given_theta"] = read["activation.given_theta"] / norm
        elif scored_by_norm and activation == "topk":
            scale_by_decoder_norm(read)
        read["dictionary.W_enc"] = read["dictionary.W_enc"] * scale_in
        for name in ("W_dec", "b_dec"):
            read[f"dictionary.{name}"] = read[f"dictionary.{name}"] / scale_out

    metadata = {
        "hook_name": hook_name or place,
        "hook_name_out": out if out != place else None,
        "source": {"format": "openmoss", "act_fn": activation, **facts},
    }
    return build_linear(contents, activation, parts, metadata, fold=fold)


def _scales(contents: Contents, place: str, out: str, given: float | None) -> tuple[float, float, str | None]:
    """By what activations were scaled at the two places, or how each row was normalised."""
    d_in = contents.setting("d_model", int)
    contents.size("d_in", d_in, "d_model in the config")
    said = contents.group(NORM, {})
    norms = {"in": said.get("in", said.get(place)), "out": said.get("out", said.get(out))}
    for key, at in (("in", place), ("out", out)):
        if contents.holds(f"{NORM}.{at}"):
            norms[key] = float(contents.tensor(f"{NORM}.{at}").read())
        elif key == "out" and out == place:
            norms[key] = norms["in"]
    kind = contents.one_of("norm_activation", ("dataset-wise", "token-wise", "inference"), "dataset-wise")
    if kind == "inference" or (kind == "token-wise" and out == place):
        return 1.0, 1.0, "constant_norm" if kind == "token-wise" else None
    if kind == "token-wise":
        raise FormatError(f"{contents.where}: norm_activation='token-wise' is not read for a transcoder")
    if given is not None:
        return given, given, None
    found = {}
    for key, norm in norms.items():
        if norm is None:
            raise FormatError(
                f"{contents.where}: it does not hold {NORM} ({key}), by which its activations were scaled: pass "
                "input_scale=sqrt(d_model) / that norm"
            )
        found[key] = contents.check(f"{NORM} ({key})", norm, float)
        if norm <= 0:
            raise FormatError(f"{contents.where}: {NORM} ({key}) is {norm}, expected a positive number")
    return math.sqrt(d_in) / found["in"], math.sqrt(d_in) / found["out"], None


def _parts(contents: Contents, activation: str, transcodes: bool) -> LinearParts:
    """The tensors, in the older or the newer layout."""
    out, older = "d_out" if transcodes else "d_in", contents.holds("encoder.weight")
    d_sae, expansion = contents.setting("d_sae", int, None), contents.setting("expansion_factor", float, None)
    if d_sae is not None:
        contents.size("d_sae", d_sae, "d_sae in the config")
    biased = contents.setting("use_decoder_bias", bool, True)
    names = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    names = names if older else ("W_E", "b_E", "W_D", "b_D")
    parts = LinearParts(
        W_enc=contents.tensor(names[0], *(("d_sae", "d_in") if older else ("d_in", "d_sae"))),
        W_dec=contents.tensor(names[2], *((out, "d_sae") if older else ("d_sae", out))),
        b_enc=contents.tensor(names[1], "d_sae"),
        b_dec=contents.tensor(names[3], out) if biased else None,
        encoder_rows=older,
        decoder_columns=older,
    )
    if expansion is not None:
        d_in = parts.W_enc.shape[1 if older else 0]
        contents.size("d_sae", round(expansion * d_in), "expansion_factor in the config")
    centred = contents.setting("apply_decoder_bias_to_pre_encoder", bool, False)
    if transcodes:
        if centred and biased:
            raise FormatError(f"{contents.where}: a transcoder with apply_decoder_bias_to_pre_encoder is not read")
        parts.settings["d_out"] = parts.W_dec.shape[0 if older else 1]
    else:
        parts.settings["apply_b_dec_to_input"] = centred and biased
    if activation == "jumprelu":
        for name in ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold"):
            if contents.holds(name):
                parts.threshold = exponential(contents.tensor(name, "d_sae"))
    return parts
