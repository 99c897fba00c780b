"""Folders of sparsify, dictionary_learning, Gemma Scope and Llama Scope, and what these libraries compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from formats_parts import BASE, D_IN, D_SAE, NORM, K, Sample, W, decoded, folder, gated, jump, pickled, pre, some, topk
from torch import Tensor

# ------------------------------------------------------------------ EleutherAI

SPARSIFY = {"activation": "topk", "expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": K}
SPARSIFY |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D_IN}


def sparsify_samples() -> list[Sample]:
    tensors = {"encoder.weight": W["W_enc"].T, "encoder.bias": W["b_enc"], "W_dec": W["W_dec"], "b_dec": W["b_dec"]}

    def write(config: dict[str, Any], inside: str, **more: Tensor) -> Any:
        return folder(SPARSIFY | config, tensors | more, "sae.safetensors", inside=inside)

    def skipped(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, recons = decoded(topk(pre(x, False)))
        return codes, recons + x @ W["W_skip"].T

    return [
        Sample("sparsify", write({}, "layers.5"), lambda x: decoded(topk(pre(x)))),
        Sample("sparsify signed", write({"signed": True}, "layers.5"), lambda x: decoded(topk(pre(x), rank=torch.abs))),
        Sample(
            "sparsify transcoder",
            write({"transcode": True}, "layers.5.mlp"),
            lambda x: decoded(topk(pre(x, False))),
            transcoder=True,
        ),
        Sample(
            "sparsify skip transcoder",
            write({"transcode": True, "skip_connection": True}, "layers.5.mlp", W_skip=W["W_skip"]),
            skipped,
            transcoder=True,
        ),
    ]


# --------------------------------------------------------- dictionary_learning


def dl_samples() -> list[Sample]:
    place = "resid_post_layer_4/trainer_0"
    linear = {"encoder.weight": W["W_enc"].T.contiguous(), "decoder.weight": W["W_dec"].T.contiguous()}
    ks = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.6)}
    gate = {"decoder_bias": W["b_dec"], "gate_bias": W["b_gate"], "mag_bias": W["b_mag"], "r_mag": W["r_mag"]}
    biased = linear | {"encoder.bias": W["b_enc"]}
    matryoshka = some(*BASE) | ks | {"group_sizes": torch.tensor([8, 16])}

    def write(kind: str, trainer: str, state: dict[str, Tensor], **more: Any) -> Any:
        config = {"dict_class": kind, "trainer_class": trainer, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 4}
        config |= {"lm_name": "EleutherAI/pythia-70m-deduped", "steps": 10, "lr": 1e-3, "seed": 0, **more}
        buffer = {"d_submodule": D_IN, "io": "out", "n_ctxs": 100, "ctx_len": 128}
        return pickled(state, config={"trainer": config, "buffer": buffer}, inside=place)

    def normed(codes: Tensor) -> tuple[Tensor, Tensor]:
        return codes * NORM, decoded(codes)[1]

    return [
        Sample(
            "dictionary_learning AutoEncoder",
            write("AutoEncoder", "StandardTrainer", biased | {"bias": W["b_dec"]}),
            lambda x: decoded(pre(x).relu()),
        ),
        Sample(
            "dictionary_learning p-anneal",
            write("AutoEncoder", "PAnnealTrainer", biased | {"bias": W["b_dec"]}, p_start=1, p_end=0.2),
            lambda x: decoded(pre(x).relu()),
        ),
        Sample(
            "dictionary_learning AutoEncoderNew",
            write("AutoEncoderNew", "StandardTrainerAprilUpdate", biased | {"decoder.bias": W["b_dec"]}),
            lambda x: decoded(pre(x, False).relu()),
        ),
        Sample(
            "dictionary_learning gated",
            write("GatedAutoEncoder", "GatedSAETrainer", linear | gate),
            lambda x: normed(gated(x)),
        ),
        Sample(
            "dictionary_learning jumprelu",
            write("JumpReluAutoEncoder", "JumpReluTrainer", some(*BASE, "threshold")),
            lambda x: normed(jump(pre(x, False), W["threshold"])),
        ),
        Sample(
            "dictionary_learning topk",
            write("AutoEncoderTopK", "TopKTrainer", biased | {"b_dec": W["b_dec"]} | ks, k=K),
            lambda x: decoded(topk(pre(x))),
        ),
        Sample(
            "dictionary_learning batchtopk",
            write("BatchTopKSAE", "BatchTopKTrainer", biased | {"b_dec": W["b_dec"]} | ks, k=K),
            lambda x: decoded(jump(pre(x), 0.6)),
        ),
        Sample(
            "dictionary_learning matryoshka",
            write("MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer", matryoshka, k=K, group_sizes=[8, 16]),
            lambda x: decoded(jump(pre(x), 0.6)),
        ),
    ]


# ------------------------------------------------------- Gemma and Llama Scope


def arrays(inside: str) -> Any:
    def write(at: Path) -> Path:
        at = at / inside
        at.mkdir(parents=True)
        np.savez(at / "params.npz", **{name: W[name].numpy() for name in (*BASE, "threshold")})
        return at

    return write


def scope_samples() -> list[Sample]:
    lower = {name.lower(): W[name] for name in (*BASE, "threshold")}
    about = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "width": D_SAE, "l0": 10}
    reads = about | {"hf_hook_point_in": "model.layers.5.output", "affine_connection": False, "type": "sae"}
    feed = {"hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output", "affine_connection": True}
    feed |= {"hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output", "type": "transcoder"}
    leap = Sample("", arrays(""), lambda x: decoded(jump(pre(x, False), W["threshold"])))
    below = "layer_3/width_16k/average_l0_9"
    root = D_IN**0.5

    def embedded(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = jump(x @ W["W_enc"] / root + W["b_enc"], W["threshold"])
        return codes, codes @ W["W_dec"] * root + W["b_dec"]

    def affine(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, recons = leap.formula(x)
        return codes, recons + x @ W["W_skip"].T

    return [
        Sample("gemma scope", arrays(f"gemma-scope-2b-pt-res/{below}"), leap.formula),
        Sample("gemma scope, embedding", arrays("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"), embedded),
        Sample(
            "gemma scope transcoder", arrays(f"gemma-scope-2b-pt-transcoders/{below}"), leap.formula, transcoder=True
        ),
        Sample("gemma scope 2", folder(reads, lower, "params.safetensors", "config.json"), leap.formula),
        Sample(
            "gemma scope 2 transcoder",
            folder(
                about | feed, lower | {"affine_skip_connection": W["W_skip"].T}, "params.safetensors", "config.json"
            ),
            affine,
            transcoder=True,
        ),
        *moss_samples(),
    ]


def moss_samples() -> list[Sample]:
    about = {"d_model": D_IN, "d_sae": D_SAE, "use_decoder_bias": True, "use_glu_encoder": False, "act_fn": "jumprelu"}
    about |= {"apply_decoder_bias_to_pre_encoder": False, "norm_activation": "dataset-wise", "top_k": 50}
    about |= {"sparsity_include_decoder_norm": True, "hook_point_in": "blocks.8.hook_resid_post"}
    norms = {"in": 6.3125, "out": 6.3125}
    older = {"encoder.weight": W["W_enc"].T, "encoder.bias": W["b_enc"], "decoder.bias": W["b_dec"]}
    older["decoder.weight"] = W["W_dec"].T

    def scope(x: Tensor, into: float, out: float, threshold: Tensor) -> tuple[Tensor, Tensor]:
        codes = jump(pre(x * into, False), threshold)
        return codes, decoded(codes)[1] / out

    factor, out = D_IN**0.5 / norms["in"], D_IN**0.5 / 3.39
    one = about | {
        "jump_relu_threshold": 0.2,
        "dataset_average_activation_norm": norms,
        "hook_point_out": about["hook_point_in"],
    }
    two = one | {"hook_point_in": "blocks.8.ln2.hook_normalized", "hook_point_out": "blocks.8.hook_mlp_out"}
    two |= {"dataset_average_activation_norm": {"in": 6.3125, "out": 3.39}}
    newer = older | {"log_jumprelu_threshold": W["threshold"].log()}
    newer["dataset_average_activation_norm.blocks.8.hook_resid_post"] = torch.tensor(6.3125)
    final = "checkpoints/final.safetensors"
    return [
        Sample(
            "llama scope",
            folder(one, older, final, "hyperparams.json"),
            lambda x: scope(x, factor, factor, 0.2 * factor / NORM),
        ),
        Sample(
            "llama scope transcoder",
            folder(two, older, final, "hyperparams.json"),
            lambda x: scope(x, factor, out, 0.2 * out / NORM),
            transcoder=True,
        ),
        Sample(
            "llama scope r1",
            folder(about | {"expansion_factor": 3}, newer, "sae_weights.safetensors", "config.json"),
            lambda x: scope(x, factor, factor, W["threshold"] / NORM),
        ),
    ]
