"""What the small files of `formats_samples.py` are made of: tensors, formulas in plain torch, ways to write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, D_OUT, K = 8, 24, 8, 3
Formula = Callable[[Tensor], tuple[Tensor | None, Tensor]]


@dataclass(frozen=True)
class Sample:
    """A file of a format, and what an activation becomes under it."""

    name: str
    write: Callable[[Path], Path]
    """Writes it into a folder; what to load."""
    formula: Formula
    """(codes, reconstruction) of rows (n, d_in); codes None where the library has no word for them."""
    transcoder: bool = False


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Random tensors; decoder rows are not of norm 1."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return {
        "W_enc": random(D_IN, D_SAE),
        "W_dec": random(D_SAE, D_IN),
        "b_enc": 0.5 * random(D_SAE),
        "b_dec": random(D_IN),
        "threshold": random(D_SAE).abs(),
        "b_gate": random(D_SAE),
        "b_mag": random(D_SAE),
        "r_mag": 0.3 * random(D_SAE),
        "W_skip": random(D_OUT, D_IN),
        "factor": 0.5 + random(D_SAE).abs(),
    }


W = weights()
NORM = W["W_dec"].norm(dim=1)
BASE = ("W_enc", "W_dec", "b_enc", "b_dec")


def pre(x: Tensor, centred: bool = True) -> Tensor:
    return (x - W["b_dec"] if centred else x) @ W["W_enc"] + W["b_enc"]


def topk(scores: Tensor, k: int = K, rank: Callable[[Tensor], Tensor] = torch.relu) -> Tensor:
    places = rank(scores).topk(k, dim=-1).indices
    kept = scores.relu() if rank is torch.relu else scores
    return torch.zeros_like(scores).scatter(-1, places, kept.gather(-1, places))


def jump(scores: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.where(scores > threshold, scores.relu(), 0.0)


def gated(x: Tensor) -> Tensor:
    s = (x - W["b_dec"]) @ W["W_enc"]
    return (s + W["b_gate"] > 0) * (W["r_mag"].exp() * s + W["b_mag"]).relu()


def decoded(codes: Tensor) -> tuple[Tensor, Tensor]:
    return codes, codes @ W["W_dec"] + W["b_dec"]


def in_row_units(x: Tensor, kind: str, encode: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """What a normalisation of each row makes of an SAE."""
    if kind == "layer_norm":
        mean, spread = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        codes, inner = decoded(encode((x - mean) / (spread + 1e-5)))
        return codes, inner * spread + mean
    factor = D_IN**0.5 / x.norm(dim=-1, keepdim=True)
    codes, inner = decoded(encode(x * factor))
    return codes, inner / factor


# --------------------------------------------------------------------- writing


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def folder(config: Any, tensors: Mapping[str, Tensor], weights: str, name: str = "cfg.json", inside: str = ".") -> Any:
    def write(at: Path) -> Path:
        at = at / inside
        at.mkdir(parents=True, exist_ok=True)
        if config is not None:
            (at / name).write_text(json.dumps(config))
        (at / weights).parent.mkdir(exist_ok=True)
        save_file(_plain(tensors), at / weights)
        return at

    return write


def pickled(
    found: Any, name: str = "ae.pt", config: Any = None, inside: str = ".", config_name: str = "config.json"
) -> Any:
    def write(at: Path) -> Path:
        at = at / inside
        at.mkdir(parents=True, exist_ok=True)
        if config is not None:
            (at / config_name).write_text(json.dumps(config))
        torch.save(found() if callable(found) else found, at / name)
        return at if name == "ae.pt" or name == "weights.pt" else at / name

    return write


def some(*names: str) -> dict[str, Tensor]:
    return {name: W[name] for name in names}
