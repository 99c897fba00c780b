"""SAEs and transcoders of SAELens, of all its versions: ``cfg.json`` and ``sae_weights.safetensors``, read and written.

Read are standard, gated, jumprelu, topk, abstopk and the transcoders; of a training that was not exported yet also
batchtopk and matryoshka_batchtopk, with the threshold that an export would give them. What a setting does follows the
source of SAELens 0.5 to 6.54: ``sae.py``, ``saes/*.py`` and ``loading/pretrained_sae_loaders.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saehooks.errors import FormatError
from saehooks.formats._linear import LinearParts, build_linear, exponential, scale_input
from saehooks.formats.contents import Contents
from saehooks.formats.saelens_writing import save
from saehooks.sae import SparseCoder
from saehooks.storage import open_folder

__all__ = ["load", "read", "save"]

ARCHITECTURES = {
    "standard": "relu",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "abstopk": "topk",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""Our activation for each of their architectures."""

ROW_NORMS = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}

TRAINING = """
    act_store_device activations_mixing_fraction adam_beta1 adam_beta2 autocast autocast_lm aux_loss_coefficient
    b_dec_init_method cached_activations_path checkpoint_path compile_llm compile_sae context_size dataset_path
    dataset_trust_remote_code dead_feature_threshold dead_feature_window decoder_heuristic_init
    decoder_heuristic_init_norm decoder_init_norm decoder_orthogonal_init device disable_concat_sequences
    eval_batch_size_prompts eval_every_n_wandb_logs exclude_special_tokens expansion_factor feature_sampling_window
    finetuning_method finetuning_tokens from_pretrained_path hook_eval hook_layer hook_point_eval hook_point_layer
    init_encoder_as_decoder_transpose is_dataset_tokenized jumprelu_bandwidth jumprelu_init_threshold
    jumprelu_sparsity_loss_mode jumprelu_ste_to_input jumprelu_tanh_scale l0_coefficient l0_warm_up_steps
    l1_coefficient l1_warm_up_steps llm_compilation_mode llm_device log_activations_store_to_wandb
    log_optimizer_state_to_wandb log_to_wandb logger lp_norm lr lr_decay_steps lr_end lr_scheduler_name
    lr_warm_up_steps matryoshka_widths model_class_name model_kwargs mse_loss_normalization
    n_batches_for_norm_estimate n_batches_in_buffer n_checkpoints n_eval_batches n_restart_cycles neuronpedia_id
    noise_scale normalize_sae_decoder output_path pre_act_loss_coefficient prefetch_llm_batches prepend_bos resume
    resume_from_checkpoint run_name sae_compilation_mode sae_lens_training_version sae_lens_version
    save_final_checkpoint scale_sparsity_penalty_by_decoder_norm seed seqpos_slice store_batch_size
    store_batch_size_prompts streaming target_l0 tokens_per_buffer topk_threshold_lr total_training_samples
    total_training_tokens train_batch_size train_batch_size_samples train_batch_size_tokens training_tokens
    use_cached_activations use_chat_formatting use_ghost_grads use_matryoshka_aux_loss use_sparse_activations verbose
    wandb_entity wandb_id wandb_log_frequency wandb_project hf_hook_name hf_hook_name_out sequence_separator_token
    shuffle_every_n_buffers n_shuffles_final n_shuffles_in_entire_dir n_shuffles_with_last_section d_out
    training_architecture training_architecture_details from_pretrained_kwargs
"""
"""Fields of their configs, of all versions, that say how the SAE was trained and change no number of it."""

POST_RELU = ("relu", "ReLU", "torch.nn.ReLU", None)


def load(
    folder: str | Path,
    *,
    hook_name: str | None = None,
    ignore: Iterable[str] = (),
    input_scale: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> SparseCoder:
    """Load an SAELens folder: the same codes and reconstructions.

    Args:
        folder: holds cfg.json and sae_weights.safetensors.
        hook_name: its site, where the folder does not say it.
        ignore: settings or tensors that you know to change nothing.
        input_scale: the factor that scaled the activations in training, for an SAE of ``expected_average_only_in``
            whose folder does not hold it.
        settings: replace what cfg.json says.
    Raises:
        FormatError: not such a folder, or something in it that is not understood.
    """
    folder = Path(folder)
    opened = open_folder(folder)
    contents = Contents(str(folder), {**opened.config, **(settings or {})}, opened.weights.tensors, ignore)
    return read(contents, hook_name=hook_name, input_scale=input_scale)


def read(contents: Contents, *, hook_name: str | None = None, input_scale: float | None = None) -> SparseCoder:
    """The SAE or transcoder of such a config and such tensors, wherever they came from."""
    facts = contents.group("metadata", {})
    kind, settings = _architecture(contents)
    transcodes = kind.endswith("transcoder")
    if transcodes:
        d_out = contents.setting("d_out", int, None)
        if d_out is not None:
            contents.size("d_out", d_out, "d_out in the config")
        contents.neutral(apply_b_dec_to_input=False, reshape_activations="none")
    else:
        settings["apply_b_dec_to_input"] = contents.setting("apply_b_dec_to_input", bool, True)
        contents.neutral(reshape_activations=("none", "hook_z"))  # the heads are joined wherever it is attached
    norm = _normalisation(contents, settings, input_scale)
    rescaled = contents.setting("rescale_acts_by_decoder_norm", bool, False)
    parts = _parts(contents, kind, settings)
    parts.score_scale = "decoder_norm" if rescaled else None
    factor = _finetuned(contents)

    def fold(read: dict[str, Tensor]) -> None:
        if factor is not None:  # codes stay as encode() gives them
            read["dictionary.W_dec"] = read["dictionary.W_dec"] * factor.to(read["dictionary.W_dec"])[:, None]
        if norm is not None:
            scale_input(read, norm)

    metadata = _metadata(contents, facts, kind, hook_name)
    return build_linear(contents, ARCHITECTURES[kind], parts, metadata, fold=fold)


def _architecture(contents: Contents) -> tuple[str, dict[str, Any]]:
    """Their architecture, and what our activation needs for it; before version 6 an activation said it too."""
    kind = contents.one_of("architecture", ARCHITECTURES, "standard")
    activation = contents.one_of("activation_fn_str", ("relu", "topk"), None)
    activation = contents.one_of("activation_fn", ("relu", "topk"), activation)
    kwargs = Contents(contents.where, contents.group("activation_fn_kwargs", {}))
    if activation == "topk" and kind == "standard":
        kind, k = "topk", kwargs.setting("k", int, None)
    else:
        k = kwargs.setting("k", int, None)
        if activation == "topk" and kind != "topk":
            raise FormatError(f"{contents.where}: architecture {kind!r} with activation_fn 'topk' is not read")
    kwargs.neutral(postact_fn=POST_RELU, signed=False)
    kwargs.finish()
    settings: dict[str, Any] = {}
    if kind in ("topk", "abstopk"):
        settings["k"] = contents.setting("k", int, k) if k is not None else contents.setting("k", int)
        if kind == "abstopk":
            settings["negative"] = "magnitude"
    elif kind.endswith("batchtopk"):
        settings["k"] = max(1, round(contents.setting("k", float)))
    return kind, settings


def _normalisation(contents: Contents, settings: dict[str, Any], input_scale: float | None) -> float | None:
    """The factor to fold into the weights, if any; what is done for each row goes into the settings."""
    known = ("none", False, True, "expected_average_only_in", *ROW_NORMS)
    value = contents.one_of("normalize_activations", known, "none")
    if value in ROW_NORMS:
        settings["row_norm"] = ROW_NORMS[value]
    if value not in (True, "expected_average_only_in"):
        if input_scale is not None:
            raise FormatError(
                f"{contents.where}: normalize_activations={value!r}, so no input_scale={input_scale} belongs to it"
            )
        return None
    if input_scale is None:
        raise FormatError(
            f"{contents.where}: normalize_activations={value!r}: the activations were scaled in training by a factor "
            "that is not in the folder. Pass input_scale=sqrt(d_in) / their mean norm, or input_scale=1.0 where the "
            "factor was folded into the weights"
        )
    return input_scale


def _parts(contents: Contents, kind: str, settings: dict[str, Any]) -> LinearParts:
    """The tensors, by their names, once their sizes are known to agree with the config."""
    out = "d_out" if kind.endswith("transcoder") else "d_in"
    for axis in ("d_in", "d_sae"):
        contents.size(axis, contents.setting(axis, int), f"{axis} in the config")
    parts = LinearParts(
        W_enc=contents.tensor("W_enc", "d_in", "d_sae"),
        W_dec=contents.tensor("W_dec", "d_sae", out),
        b_dec=contents.tensor("b_dec", out),
        settings=settings,
    )
    if out == "d_out":
        settings["d_out"] = parts.W_dec.shape[1]
    if kind == "gated":
        gate = tuple(contents.tensor(name, "d_sae") for name in ("b_gate", "b_mag", "r_mag"))
        parts.gate = gate  # type: ignore[assignment]
        return parts
    parts.b_enc = contents.tensor("b_enc", "d_sae")
    if kind.startswith("jumprelu"):
        name = "threshold" if contents.holds("threshold") or not contents.holds("log_threshold") else "log_threshold"
        parts.threshold = contents.tensor(name, "d_sae")
        if name == "log_threshold":  # checkpoints of trainings
            parts.threshold = exponential(parts.threshold)
    if kind.endswith("batchtopk"):
        parts.threshold = contents.tensor("topk_threshold")
    if "skip" in kind:
        parts.W_skip, settings["skip"] = contents.tensor("W_skip", "d_out", "d_in"), True
    return parts


def _finetuned(contents: Contents) -> Tensor | None:
    """The factor that a fine-tuning gave each latent's decoder row; it was written as ones for a while."""
    wanted = contents.setting("finetuning_scaling_factor", bool, False)
    names = [name for name in ("scaling_factor", "finetuning_scaling_factor") if contents.holds(name)]
    if not names:
        return None
    factor = contents.tensor(names[0], "d_sae").read()
    if torch.allclose(factor.float(), torch.ones(1)):
        return None
    if not wanted:
        raise FormatError(
            f"{contents.where}: it holds a {names[0]} that is not 1, and finetuning_scaling_factor is not set: it is "
            "not known whether the factor is to be applied"
        )
    return factor


def _metadata(contents: Contents, facts: dict[str, Any], kind: str, hook_name: str | None) -> dict[str, Any]:
    """What is known of the SAE, from the config (before version 6) and its metadata."""

    def fact(*names: str, kind: Any = str) -> Any:
        found = None
        for name in names:
            own = contents.setting(name, kind, None)
            found = own if found is None else found
        for name in names:
            if facts.get(name) is not None:
                found = contents.check(f"metadata {name}", facts[name], kind)
        return found

    site, head = fact("hook_name", "hook_point"), fact("hook_head_index", "hook_point_head_index", kind=int)
    out, model = fact("hook_name_out"), fact("model_name")
    fact("hook_head_index_out", kind=int)
    processing = _processing(fact("model_from_pretrained_kwargs", kind=dict) or {})
    contents.one_of("dtype", ("float32", "float64", "bfloat16", "float16", *(f"torch.{n}" for n in DTYPES)), None)
    training = {name: value for name, value in contents.known(TRAINING).items() if value is not None}
    source = {"format": "saelens", "architecture": kind, **{n: v for n, v in {**training, **facts}.items() if v}}
    return {
        "hook_name": hook_name or site,
        "hook_name_out": out,
        "head": head,
        "model_name": model,
        "processing": processing or None,
        "training": _positions(source.get("seqpos_slice")),
        "source": source,
    }


def _positions(found: Any) -> dict[str, str] | None:
    """Where in its texts an SAE was trained, in the words of `where=`, if their slice leaves any position out."""
    ends = found if isinstance(found, list | tuple) else ()
    if len(ends) > 3 or any(type(end) not in (int, type(None)) for end in ends) or 0 in ends[2:]:
        return None
    kept = slice(*ends) if ends else slice(None)
    if (kept.start or 0, kept.stop, kept.step or 1) == (0, None, 1):
        return None
    if (kept.start, kept.stop, kept.step or 1) == (1, None, 1):
        return {"positions": "all but the first"}
    said = f"{kept.start}, {kept.stop}" + ("" if kept.step is None else f", {kept.step}")
    return {"positions": f"sh.positions(slice({said}))"}


DTYPES = ("float32", "float64", "bfloat16", "float16")


def _processing(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What their arguments for loading the model say about its weights, in the words of a host."""
    names = {"center_writing_weights": "centered", "fold_ln": "folded"}
    return {ours: kwargs[theirs] for theirs, ours in names.items() if isinstance(kwargs.get(theirs), bool)}
