"""Files of one pickle, of OpenAI, PatchSAE, Prisma, saev and others, and what these libraries compute."""

from __future__ import annotations

import json
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from formats_parts import BASE, D_IN, D_SAE, K, Sample, W, decoded, folder, in_row_units, pickled, pre, some, topk
from torch import Tensor


def with_config_object(state: dict[str, Tensor], **attributes: Any) -> Callable[[], Any]:
    """A checkpoint of a config object, whose class cannot be imported when it is read."""

    def make() -> Any:
        module = types.ModuleType("config_of_a_stranger")
        kind = type("ViTSAERunnerConfig", (), {"__module__": module.__name__})
        module.ViTSAERunnerConfig = kind  # type: ignore[attr-defined]
        cfg = kind()
        cfg.__dict__.update(attributes)
        sys.modules[module.__name__] = module
        return {"cfg": cfg, "state_dict": state}

    return make


def saev(config: dict[str, Any]) -> Any:
    def write(at: Path) -> Path:
        with (at / "sae.pt").open("wb") as file:
            file.write(json.dumps(config).encode() + b"\n")
            torch.save(some(*BASE), file)
        return at / "sae.pt"

    return write


def plain_pickle(found: Any, name: str) -> Any:
    def write(at: Path) -> Path:
        (at / name).write_bytes(pickle.dumps(found))
        return at / name

    return write


def pickle_samples() -> list[Sample]:
    openai = {"pre_bias": W["b_dec"], "encoder.weight": W["W_enc"].T.contiguous(), "latent_bias": W["b_enc"]}
    openai |= {"decoder.weight": W["W_dec"].T.contiguous(), "stats_last_nonzero": torch.zeros(D_SAE).long()}
    openai |= {"latents_activation_frequency": torch.ones(D_SAE), "latents_mean_square": torch.zeros(D_SAE)}
    top = openai | {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    layers = {"encoder_linear.weight": W["W_enc"].T.contiguous(), "encoder_linear.bias": W["b_enc"]}
    layers |= {"decoder_linear.weight": W["W_dec"].T.contiguous(), "decoder_linear.bias": W["b_dec"]}
    patch = {"d_in": D_IN, "d_sae": D_SAE, "block_layer": -2, "module_name": "resid", "gated_sae": False}
    patch |= {"model_name": "openai/clip-vit-base-patch16", "dtype": torch.float32, "device": torch.device("cpu")}
    prisma = {"d_in": D_IN, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "architecture": "standard"}
    prisma |= {"normalize_activations": "layer_norm", "hook_point_layer": 9, "layer_subtype": "hook_mlp_out"}
    prisma |= {"is_transcoder": False, "model_name": "open-clip:laion/CLIP-ViT-B-32", "_dtype": "float32"}
    header = {"schema": 2, "commit": "0", "lib": "0.2", "cfg": {"d_vit": D_IN, "exp_factor": 3, "seed": 0}}
    header["cfg"]["activation"] = {"cls": "TopK", "params": {"top_k": K}}
    older = {"d_vit": D_IN, "exp_factor": 3, "sparsity_coeff": 4e-4, "n_reinit_samples": 0, "ghost_grads": False}
    hook_z = {"act_size": D_IN, "dict_size": D_SAE, "act_name": "blocks.0.attn.hook_z"}
    turned = {"W_enc": W["W_enc"].T.contiguous(), "W_dec": W["W_dec"].T.contiguous(), **some("b_enc", "b_dec")}

    def normalised(x: Tensor) -> tuple[Tensor, Tensor]:
        return in_row_units(x, "layer_norm", lambda z: topk(pre(z)))

    def qwen(at: Path) -> Path:  # its repository says d_sae in thousands, so the sample is wider
        at = at / "SAE-Res-Qwen3-1.7B-Base-W1K-L0_3"
        at.mkdir()
        torch.save({n: wide(t) for n, t in turned.items()}, at / "layer2.sae.pt")
        return at / "layer2.sae.pt"

    def wide(tensor: Tensor) -> Tensor:
        """Latents that never are among the k largest, up to 1024."""
        for axis, size in enumerate(tensor.shape):
            if size == D_SAE:
                shape = list(tensor.shape)
                shape[axis] = 1024 - D_SAE
                filler = torch.full(shape, -1e6) if tensor.dim() == 1 else torch.zeros(shape)
                return torch.cat([tensor, filler], axis)
        return tensor

    def qwen_formula(x: Tensor) -> tuple[None, Tensor]:
        return None, decoded(topk(pre(x, False)))[1]

    relu = {"block_layer": 10, "d_in": D_IN, "d_sae": D_SAE}
    return [
        Sample("openai topk", pickled(top, "8.pt", inside="resid_post_mlp_v5_32k/autoencoders"), normalised),
        Sample(
            "openai relu",
            pickled(openai | {"activation": "ReLU", "activation_state_dict": {}}, "8.pt"),
            lambda x: decoded(pre(x).relu()),
        ),
        Sample(
            "goodfire", pickled(layers, "Llama-3.1-8B-Instruct-SAE-l19.pth"), lambda x: decoded(pre(x, False).relu())
        ),
        Sample("qwen scope", qwen, qwen_formula),
        Sample(
            "hook_z (Kissane et al.)",
            pickled(some(*BASE), "z.pt", hook_z, config_name="z_cfg.json"),
            lambda x: decoded(pre(x).relu()),
        ),
        Sample(
            "patchsae",
            pickled(with_config_object(some(*BASE), **patch), "clip_-2_resid.pt"),
            lambda x: decoded(pre(x).relu()),
        ),
        Sample(
            "patchsae, plain pickle",
            plain_pickle({"cfg": relu, "state_dict": some(*BASE)}, "sae.pkl"),
            lambda x: decoded(pre(x).relu()),
        ),
        Sample("prisma", pickled(some(*BASE), "weights.pt", prisma), normalised),
        Sample("saev 0.1", saev(older), lambda x: decoded(pre(x).relu())),
        Sample("saev topk", saev(header), lambda x: decoded(topk(pre(x, False), rank=torch.clone))),
        Sample(
            "circuit-tracer",
            folder(None, some("W_dec", "b_enc", "b_dec") | {"W_enc": W["W_enc"].T}, "layer_3.safetensors"),
            lambda x: decoded(pre(x, False).relu()),
            transcoder=True,
        ),
    ]
