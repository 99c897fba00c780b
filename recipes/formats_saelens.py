"""SAELens' files, as its versions 2 to 6 write them, and what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from formats_parts import (
    BASE,
    D_IN,
    D_OUT,
    D_SAE,
    NORM,
    K,
    Sample,
    W,
    decoded,
    folder,
    gated,
    in_row_units,
    jump,
    pre,
    some,
    topk,
)
from torch import Tensor

OLD = {
    "model_name": "gpt2-small",
    "hook_name": "blocks.1.hook_resid_post",
    "hook_layer": 1,
    "hook_head_index": None,
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "torch.float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "normalize_activations": "none",
    "prepend_bos": True,
    "context_size": 128,
    "dataset_path": "some/text",
    "dataset_trust_remote_code": True,
    "sae_lens_training_version": "3.22.2",
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
}
NEW = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.1.hook_resid_post", "model_name": "gpt2"},
}
APRIL = {name: value for name, value in OLD.items() if not name.startswith(("hook", "activation_fn"))}
APRIL |= {"hook_point": "blocks.1.hook_resid_pre", "hook_point_layer": 1, "hook_point_head_index": None}
OUT = {"hook_name_out": "blocks.1.hook_mlp_out", "hook_name": "blocks.1.hook_mlp_in", "sae_lens_version": "6.54.12"}


def lens(config: Mapping[str, Any], *names: str, **more: Tensor) -> Any:
    return folder(dict(config), {**some(*names), **more}, "sae_weights.safetensors")


def lens_samples() -> list[Sample]:
    relu = Sample("saelens standard", lens(NEW | {"architecture": "standard"}, *BASE), lambda x: decoded(pre(x).relu()))
    skip = {"apply_b_dec_to_input": False, "d_out": D_OUT, "metadata": OUT}

    def transcoded(codes: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        codes, recons = decoded(codes)
        return codes, recons if x is None else recons + x @ W["W_skip"].T

    jumped = ("jumprelu", (*BASE, "threshold"), lambda x: jump(pre(x, False), W["threshold"]))
    plain = ("", BASE, lambda x: pre(x, False).relu())
    samples = [
        relu,
        Sample(
            "saelens standard, input as it is",
            lens(NEW | {"architecture": "standard", "apply_b_dec_to_input": False}, *BASE),
            lambda x: decoded(pre(x, False).relu()),
        ),
        Sample(
            "saelens gated",
            lens(NEW | {"architecture": "gated"}, "W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
            lambda x: decoded(gated(x)),
        ),
        Sample(
            "saelens jumprelu",
            lens(NEW | {"architecture": "jumprelu"}, *BASE, "threshold"),
            lambda x: decoded(jump(pre(x), W["threshold"])),
        ),
        Sample(
            "saelens topk",
            lens(NEW | {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": False}, *BASE),
            lambda x: decoded(topk(pre(x))),
        ),
        Sample(
            "saelens topk, rescaled",
            lens(NEW | {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True}, *BASE),
            lambda x: (topk(pre(x) * NORM), decoded(topk(pre(x) * NORM) / NORM)[1]),
        ),
        Sample(
            "saelens abstopk",
            lens(NEW | {"architecture": "abstopk", "k": K, "rescale_acts_by_decoder_norm": False}, *BASE),
            lambda x: decoded(topk(pre(x), rank=torch.abs)),
        ),
        Sample(
            "saelens batchtopk, in training",
            lens(
                NEW
                | {
                    "architecture": "batchtopk",
                    "k": 3.0,
                    "rescale_acts_by_decoder_norm": True,
                    "decoder_init_norm": 0.1,
                    "topk_threshold_lr": 0.01,
                    "aux_loss_coefficient": 1.0,
                    "use_sparse_activations": False,
                },
                *BASE,
                topk_threshold=torch.tensor(0.8).double(),
            ),
            lambda x: (jump(pre(x) * NORM, 0.8), decoded(jump(pre(x) * NORM, 0.8) / NORM)[1]),
        ),
        Sample(
            "saelens 5 topk",
            lens(
                OLD | {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, *BASE
            ),
            lambda x: decoded(topk(pre(x))),
        ),
        Sample(
            "saelens April 2024", lens(APRIL, *BASE, scaling_factor=torch.ones(D_SAE)), lambda x: decoded(pre(x).relu())
        ),
        Sample(
            "saelens finetuned",
            lens(
                OLD | {"architecture": "standard", "finetuning_scaling_factor": True}, *BASE, scaling_factor=W["factor"]
            ),
            lambda x: (pre(x).relu(), decoded(pre(x).relu() * W["factor"])[1]),
        ),
        Sample(
            "saelens layer_norm",
            lens(NEW | {"architecture": "standard", "normalize_activations": "layer_norm"}, *BASE),
            lambda x: in_row_units(x, "layer_norm", lambda z: pre(z).relu()),
        ),
        Sample(
            "saelens constant_norm_rescale",
            lens(
                OLD | {"architecture": "jumprelu", "normalize_activations": "constant_norm_rescale"}, *BASE, "threshold"
            ),
            lambda x: in_row_units(x, "constant", lambda z: jump(pre(z), W["threshold"])),
        ),
    ]
    for kind, names, encode in (plain, jumped):
        for skips in (False, True):
            words = "_".join([kind] * bool(kind) + ["skip"] * skips + ["transcoder"])
            tensors = (*names, "W_skip") if skips else names
            samples.append(
                Sample(
                    f"saelens {words}",
                    lens(NEW | skip | {"architecture": words}, *tensors),
                    lambda x, e=encode, s=skips: transcoded(e(x), x if s else None),
                    transcoder=True,
                )
            )
    return samples
