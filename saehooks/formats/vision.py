"""SAEs of vision transformers: PatchSAE and its forerunner, Prisma, and saev.

PatchSAE and Prisma are a pickle of ``cfg`` and ``state_dict`` (so are SAELens' files before its version 2); Prisma's
newer ones are ``weights.pt`` with ``config.json``; saev's is a line of JSON before a file of torch. None is run.
Sources: PatchSAE ``src/sae_training``; ViT-Prisma ``src/vit_prisma/sae``; saev 0.1.0 ``nn.py`` and later
``nn/modeling.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from saehooks.errors import FormatError
from saehooks.formats._linear import LinearParts, build_linear
from saehooks.formats.archives import open_torch_file
from saehooks.formats.contents import Contents
from saehooks.formats.saelens import TRAINING as OF_SAELENS
from saehooks.sae import SparseCoder
from saehooks.storage import parse_json

BLOCKS = {"base": 12, "large": 24, "huge": 32}
"""Blocks of CLIP's vision transformers by the size in their names, for blocks that are counted from the end."""

ROW_NORMS = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}

TRAINING = """
    _device _dtype b_dec_init_method batch_size cached_activations_path checkpoint_path class_token cls_token
    cls_token_only context_size create_dataloader custom_clip_ckpt_path dataset_name dataset_path dataset_train_path
    dataset_val_path dead_feature_estimation_method dead_feature_threshold dead_feature_window debug_numerics device
    dtype expansion_factor feature_reinit_scale feature_sampling_method feature_sampling_window from_pretrained_path
    ghost_grad_exp_clamp_max hook_point_head_index image_height image_key image_size image_width
    initialization_method is_training l1_coefficient label_key log_to_wandb lp_norm lr lr_scheduler_name
    lr_warm_up_steps max_batch_size_for_vit_forward_pass max_grad_norm min_explained_variance min_l0 model_class_name
    model_path mse_cls_coefficient n_batches_in_buffer n_batches_in_store n_checkpoints n_validation_runs norm_eps
    num_epochs num_workers resample_batches return_out_only run_name seed store_batch_size store_size
    tokens_per_buffer total_training_images total_training_steps total_training_tokens train_batch_size unique_hash
    use_cached_activations use_ghost_grads use_patches_only verbose vit_model_cfg wandb_entity wandb_log_frequency
    wandb_project d_out out_hook_point_layer layer_out_subtype transcoder_with_skip_connection
"""


def read_pair(
    cfg: Mapping[str, Any], state: Any, where: str, *, hook_name: str | None = None, ignore: Iterable[str] = ()
) -> SparseCoder:
    """The SAE of a config and a state dict of PatchSAE, Prisma, or SAELens before version 2."""
    if not isinstance(state, dict):
        raise FormatError(f"{where}: its state_dict is a {type(state).__name__}")
    contents = Contents(where, cfg, state, ignore)
    contents.neutral(gated_sae=False, is_transcoder=False, noise_scale=(0, 0.0), normalize_sae_decoder=(True, False))
    kind = contents.one_of("architecture", ("standard", "gated"), "standard")
    activation, settings = _activation(contents, kind)
    norm = contents.one_of("normalize_activations", ("none", False, *ROW_NORMS), "none")
    if norm in ROW_NORMS:
        settings["row_norm"] = ROW_NORMS[norm]
    settings["apply_b_dec_to_input"] = contents.setting("apply_b_dec_to_input", bool, True)
    contents.size("d_in", contents.setting("d_in", int), "d_in in the config")
    size = contents.setting("d_sae", int, None)
    if size is not None:
        contents.size("d_sae", size, "d_sae in the config")
    parts = LinearParts(
        W_enc=contents.tensor("W_enc", "d_in", "d_sae"),
        W_dec=contents.tensor("W_dec", "d_sae", "d_in"),
        b_dec=contents.tensor("b_dec", "d_in"),
        settings=settings,
    )
    if kind == "gated":
        gate = tuple(contents.tensor(name, "d_sae") for name in ("b_gate", "b_mag", "r_mag"))
        parts.gate = gate  # type: ignore[assignment]
        contents.skip("b_enc")  # which their gated SAE holds and does not use
    else:
        parts.b_enc = contents.tensor("b_enc", "d_sae")
    metadata = _metadata(contents, hook_name)
    return build_linear(contents, "gated" if kind == "gated" else activation, parts, metadata)


def _activation(contents: Contents, kind: str) -> tuple[str, dict[str, Any]]:
    known = ("relu",) if kind == "gated" else ("relu", "topk")
    activation = contents.one_of("activation_fn_str", known, None)
    activation = contents.one_of("activation_fn", known, activation or "relu")
    kwargs = Contents(contents.where, contents.group("activation_fn_kwargs", {}))
    settings = {"k": kwargs.setting("k", int)} if activation == "topk" else {}
    kwargs.known("k")
    kwargs.finish()
    return activation, settings


def _metadata(contents: Contents, hook_name: str | None) -> dict[str, Any]:
    """The site: in a vision tower after a block that PatchSAE or Prisma counts; by its own name in a language model."""
    model = contents.setting("model_name", str, None)
    block, module = contents.setting("block_layer", int, None), contents.setting("module_name", str, None)
    layer, kind = contents.setting("hook_point_layer", int, None), contents.setting("layer_subtype", str, None)
    point = contents.setting("hook_point", str, None)
    seeing = "ViT" in str(contents.setting("model_class_name", str, "")) or kind is not None
    site = None
    if block is not None and module in ("resid", None):
        count = next((n for word, n in BLOCKS.items() if word in (model or "").lower()), None)
        index = block if block >= 0 else None if count is None else count + block
        site = f"visual.blocks.{index}.hook_resid_post" if index is not None and index >= 0 else None
    elif point is not None:
        site = f"visual.{point}" if seeing else point
    elif layer is not None and kind is not None:
        site = f"visual.blocks.{layer}.{kind}"
    facts = {**contents.known(TRAINING), **contents.known(OF_SAELENS)}
    simple = {name: value for name, value in facts.items() if isinstance(value, str | int | float | bool)}
    places = {"cls_token_only": "sh.positions([0])", "use_patches_only": "all but the first"}
    rule = next(({"positions": rule} for name, rule in places.items() if facts.get(name) is True), None)
    source = {"format": "vision", **simple}
    return {"hook_name": hook_name or site, "model_name": model, "training": rule, "source": source}


# ------------------------------------------------------------------------ saev


def read_saev(path: str | Path, *, hook_name: str | None = None, ignore: Iterable[str] = ()) -> SparseCoder:
    """An SAE of saev, which is meant for activations as its dataset scaled them: the file does not hold that scale.

    Raises:
        FormatError: not such a file, or something in it that is not understood.
    """
    path = Path(path)
    with path.open("rb") as file:
        line = file.readline(2**20)
    header = Contents(str(path), parse_json(line, f"the first line of {path}"))
    state = open_torch_file(path, len(line))
    schema = header.one_of("schema", (2,), None)
    if schema is None:  # 0.1: the header is the config
        activation, settings = "relu", {"apply_b_dec_to_input": True}
        config = header
        config.known("sparsity_coeff ghost_grads l1_coeff use_ghost_grads")
    else:
        header.known("commit lib")
        config = Contents(str(path), header.group("cfg"))
        header.finish()
        activation, settings = _saev_activation(config)
    contents = Contents(str(path), {}, state if isinstance(state, dict) else {}, ignore)
    d_in = config.setting("d_vit", int)
    contents.size("d_in", d_in, "d_vit in the header")
    contents.size("d_sae", d_in * config.setting("exp_factor", int), "exp_factor in the header")
    config.known("n_reinit_samples remove_parallel_grads normalize_w_dec seed")
    config.finish()
    parts = LinearParts(
        W_enc=contents.tensor("W_enc", "d_in", "d_sae"),
        b_enc=contents.tensor("b_enc", "d_sae"),
        W_dec=contents.tensor("W_dec", "d_sae", "d_in"),
        b_dec=contents.tensor("b_dec", "d_in"),
        settings=settings,
    )
    return build_linear(contents, activation, parts, {"hook_name": hook_name, "source": {"format": "saev"}})


def _saev_activation(config: Contents) -> tuple[str, dict[str, Any]]:
    """Later versions take b_dec off no input; their top-k, by row in both its kinds, keeps what is negative."""
    inner = Contents(config.where, config.group("activation"))
    kind = inner.one_of("cls", ("Relu", "TopK", "BatchTopK"))
    given = Contents(config.where, inner.group("params", {}))
    settings: dict[str, Any] = {"apply_b_dec_to_input": False}
    if kind != "Relu":
        settings |= {"k": given.setting("top_k", int), "negative": "value"}
    given.finish()
    inner.finish()
    return "relu" if kind == "Relu" else "topk", settings


def is_saev(head: bytes) -> bool:
    """Whether a file begins as those of saev do."""
    return re.match(rb'\{\s*"', head) is not None
