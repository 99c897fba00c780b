"""SAEs of dictionary_learning: ``ae.pt``, a pickled state dict that is read without running it, and ``config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from saehooks.errors import FormatError
from saehooks.formats._linear import linear_sae, need
from saehooks.formats.unpickling import read_pickle
from saehooks.sae import SAE
from saehooks.storage import read_json

WEIGHTS, CONFIG = "ae.pt", "config.json"
SUBTRACTED = {
    "AutoEncoder": "bias",
    "AutoEncoderTopK": "b_dec",
    "BatchTopKSAE": "b_dec",
    "GatedAutoEncoder": "decoder_bias",
}
"""The classes that have an ``nn.Linear`` encoder, and the name of the bias they subtract before it."""


def load(folder: str | Path, *, hook_name: str | None = None) -> SAE:
    """Load a dictionary_learning folder: the same codes and reconstructions.

    Args:
        folder: holds ae.pt and, to say which class it is, config.json.
        hook_name: its site, which the folder does not say in our terms.
    Raises:
        FormatError: not such a folder, or a class that is not read.
    """
    folder, where = Path(folder), str(folder)
    state = read_pickle(folder / WEIGHTS)
    if not isinstance(state, dict):
        raise FormatError(f"{where}: {WEIGHTS} holds a {type(state).__name__}, expected a state dict")
    trainer = read_json(folder / CONFIG).get("trainer", {}) if (folder / CONFIG).is_file() else {}
    kind = trainer.get("dict_class") or _guess(state)
    metadata = {
        "hook_name": hook_name,
        "model_name": trainer.get("lm_name"),
        "source": {"format": "dictionary_learning", "dict_class": kind},
    }
    if kind == "JumpReluAutoEncoder":
        return _jumprelu(where, state, metadata)
    if kind not in SUBTRACTED:
        raise FormatError(
            f"{where}: class {kind!r}; what can be read: {', '.join([*SUBTRACTED, 'JumpReluAutoEncoder'])}"
        )
    weight, decoder, bias = need(state, ("encoder.weight", "decoder.weight", SUBTRACTED[kind]), where)
    named: dict[str, Tensor] = {
        "dictionary.W_enc": weight.T,
        "dictionary.W_dec": decoder.T,
        "dictionary.b_dec": bias,
    }
    activation, settings = _activation(kind, state, trainer, named, where)
    return linear_sae(where, activation, named, metadata, **settings)


def _activation(
    kind: str, state: dict[str, Any], trainer: dict[str, Any], named: dict[str, Tensor], where: str
) -> tuple[str, dict[str, Any]]:
    """Our activation with its settings; its tensors are added to ``named``."""
    if kind == "GatedAutoEncoder":
        found = need(state, ("gate_bias", "mag_bias", "r_mag"), where)
        named |= {f"activation.{n}": t for n, t in zip(("b_gate", "b_mag", "r_mag"), found, strict=True)}
        return "gated", {}
    (named["dictionary.b_enc"],) = need(state, ("encoder.bias",), where)
    if kind == "AutoEncoder":
        return "relu", {}
    k = int(state["k"]) if "k" in state else int(need(trainer, ("k",), where)[0])
    if kind == "AutoEncoderTopK":
        return "topk", {"k": k}
    (threshold,) = need(state, ("threshold",), where)
    named["activation.threshold"] = threshold.reshape(())
    return "batchtopk", {"k": k}


def _jumprelu(where: str, state: dict[str, Any], metadata: dict[str, Any]) -> SAE:
    """Their JumpReLU is in the layout of Gemma Scope; b_dec is not subtracted from the input."""
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    W_enc, b_enc, W_dec, b_dec, threshold = need(state, names, where)
    named = {
        "dictionary.W_enc": W_enc,
        "dictionary.b_enc": b_enc,
        "dictionary.W_dec": W_dec,
        "dictionary.b_dec": b_dec,
        "activation.log_theta": threshold.clamp(min=0).log(),
    }
    return linear_sae(where, "jumprelu", named, metadata, apply_b_dec_to_input=False)


def _guess(state: dict[str, Any]) -> str | None:
    """The class by the tensors it has, where no config says it."""
    if "gate_bias" in state:
        return "GatedAutoEncoder"
    if "W_enc" in state and "threshold" in state:
        return "JumpReluAutoEncoder"
    if "encoder.weight" not in state:
        return None
    return "AutoEncoder" if "bias" in state else "BatchTopKSAE" if "threshold" in state else "AutoEncoderTopK"
