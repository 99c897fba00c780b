"""Building a linear SAE or transcoder from the tensors of another library's file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saehooks.errors import FormatError
from saehooks.formats.contents import FLOATS, Contents
from saehooks.sae import SAEConfig, SparseCoder, without_memory
from saehooks.storage import StoredTensor


@dataclass
class LinearParts:
    """The tensors of a linear SAE, in the file's layout: none is read before the shapes of all fit."""

    W_enc: StoredTensor
    """(d_in, d_sae), or (d_sae, d_in) with ``encoder_rows``."""
    W_dec: StoredTensor
    """(d_sae, d_out), or (d_out, d_sae) with ``decoder_columns``."""
    b_enc: StoredTensor | None = None
    """(d_sae,), or None for zeros."""
    b_dec: StoredTensor | None = None
    """(d_out,), or None for zeros."""
    encoder_rows: bool = False
    decoder_columns: bool = False
    gate: tuple[StoredTensor, StoredTensor, StoredTensor] | None = None
    """b_gate, b_mag and r_mag of a gated SAE, (d_sae,) each."""
    threshold: StoredTensor | float | None = None
    """(d_sae,) or one number: of a JumpReLU, or of a BatchTopK."""
    W_skip: StoredTensor | None = None
    """(d_out, d_in) of a skip transcoder."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of our SAE."""
    score_scale: str | None = None
    """``"decoder_norm"``: codes are in units of the decoder rows, which have norm 1 after it; None: as they are."""


def build_linear(
    contents: Contents,
    activation: str,
    parts: LinearParts,
    metadata: Mapping[str, Any],
    *,
    fold: Any = None,
    dtype: torch.dtype | None = None,
) -> SparseCoder:
    """A linear SAE, or a transcoder where the settings have d_out, in eval mode.

    Args:
        contents: the file, of which nothing may be left.
        activation: a key of `saehooks.activations.ACTIVATIONS`.
        parts: its tensors.
        metadata: what is known; None values are dropped.
        fold: changes the read tensors, a dict by our names, in place; run last.
        dtype: what it computes in; the type of the encoder if not given.
    Raises:
        FormatError: tensors that do not fit one another, or contents of the file that are not understood.
    """
    contents.finish()
    d_in, d_sae = parts.W_enc.shape[::-1] if parts.encoder_rows else parts.W_enc.shape
    if dtype is None:
        dtype = parts.W_enc.dtype if parts.W_enc.dtype in FLOATS else torch.float32
    settings = dict(parts.settings)
    if activation == "jumprelu":
        settings["given"] = True
    known = {name: value for name, value in metadata.items() if value is not None}
    cfg = SAEConfig(d_in, d_sae, "linear", activation, settings, str(dtype)[6:], known)
    sae = without_memory(cfg, contents.where)
    read = _read(parts, sae.state_dict(), activation, dtype)
    if parts.score_scale == "decoder_norm":
        scale_by_decoder_norm(read)
    if fold is not None:
        fold(read)
    sae.adopt(read, contents.where)
    return sae


def _read(parts: LinearParts, expected: Mapping[str, Tensor], activation: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors by our names, in one type; what the file has none of keeps its starting value."""
    W_enc, W_dec = parts.W_enc.read().to(dtype), parts.W_dec.read().to(dtype)
    read = {
        "dictionary.W_enc": W_enc.T if parts.encoder_rows else W_enc,
        "dictionary.W_dec": W_dec.T if parts.decoder_columns else W_dec,
    }
    named: dict[str, StoredTensor | None] = {"b_enc": parts.b_enc, "b_dec": parts.b_dec, "W_skip": parts.W_skip}
    read |= {f"dictionary.{name}": tensor.read().to(dtype) for name, tensor in named.items() if tensor is not None}
    if parts.gate is not None:
        names = ("b_gate", "b_mag", "r_mag")
        read |= {f"activation.{n}": t.read().to(dtype) for n, t in zip(names, parts.gate, strict=True)}
    if parts.threshold is not None:
        name = "activation.given_theta" if activation == "jumprelu" else "activation.threshold"
        given = parts.threshold.read() if isinstance(parts.threshold, StoredTensor) else torch.tensor(parts.threshold)
        # What is not above 0 is 0 after the relu, so that a lower threshold is the threshold 0.
        read[name] = given.to(dtype).clamp(min=0).reshape(-1 if given.numel() > 1 else ()).expand(expected[name].shape)
    for name, like in expected.items():
        if name not in read:
            read[name] = _starting_value(name, like)
    return {name: tensor.contiguous() if tensor.dim() < 2 else tensor for name, tensor in read.items()}


def _starting_value(name: str, like: Tensor) -> Tensor:
    """What a parameter or buffer that other libraries have none of holds: nothing that changes a number."""
    if name == "activation.unit":
        return torch.ones(like.shape, dtype=like.dtype)
    if name == "activation.batches":  # so many that the next one moves the threshold by the smallest rate
        return torch.full(like.shape, 10**6, dtype=like.dtype)
    if name in ("dictionary.b_enc", "dictionary.b_dec", "activation.log_theta"):
        return torch.zeros(like.shape, dtype=like.dtype)
    raise FormatError(f"no tensor for {name}")


def exponential(logarithm: StoredTensor) -> StoredTensor:
    """The tensor whose logarithm a file holds."""
    return StoredTensor(logarithm.shape, logarithm.dtype, lambda: logarithm.read().exp())


def scale_by_decoder_norm(read: dict[str, Tensor]) -> None:
    """Multiply codes by the norms (d_sae,) of their decoder rows, which then have norm 1; the reconstruction stays."""
    norm = read["dictionary.W_dec"].norm(dim=1)
    if bool((norm == 1).all()):
        return
    scale_codes(read, norm)


def scale_codes(read: dict[str, Tensor], factor: Tensor) -> None:
    """Multiply each latent's codes, (d_sae,), and divide its decoder row: the reconstruction stays as it is."""
    read["dictionary.W_dec"] = read["dictionary.W_dec"] / factor[:, None]
    if "activation.r_mag" in read:  # the gate keeps its own scores
        read["activation.r_mag"] = read["activation.r_mag"] + factor.log()
        read["activation.b_mag"] = read["activation.b_mag"] * factor
        return
    read["dictionary.W_enc"] = read["dictionary.W_enc"] * factor
    for name in ("dictionary.b_enc", "activation.given_theta"):
        if name in read:
            read[name] = read[name] * factor


def scale_input(read: dict[str, Tensor], factor: float) -> None:
    """Fold ``factor`` into W_enc (d_in, d_sae), W_dec and b_dec of an SAE that was trained on activations times it."""
    read["dictionary.W_enc"] = read["dictionary.W_enc"] * factor
    for name in ("dictionary.W_dec", "dictionary.b_dec"):
        read[name] = read[name] / factor
