"""SAEs of EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors``, top-k with a linear encoder."""

from __future__ import annotations

from pathlib import Path

from saehooks.errors import FormatError
from saehooks.formats._linear import linear_sae, need
from saehooks.sae import SAE
from saehooks.storage import CONFIG, read_json, read_safetensors

WEIGHTS = "sae.safetensors"


def load(folder: str | Path, *, hook_name: str | None = None) -> SAE:
    """Load a sparsify folder: the same codes and reconstructions.

    Args:
        folder: holds cfg.json and sae.safetensors.
        hook_name: its site, which the folder does not say in our terms.
    Raises:
        FormatError: not such a folder, or a transcoder (which reads one place and writes another).
    """
    folder, where = Path(folder), str(folder)
    cfg = read_json(folder / CONFIG)
    tensors, _ = read_safetensors(folder / WEIGHTS)
    if cfg.get("transcode") or cfg.get("skip_connection") or "W_skip" in tensors:
        raise FormatError(f"{where} is a transcoder, not an autoencoder: it cannot be attached to one site")
    if cfg.get("activation", "topk") != "topk":
        raise FormatError(f"{where}: activation {cfg['activation']!r} is not read, only topk")
    (k,) = need(cfg, ("k",), where)
    weight, bias, W_dec, b_dec = need(tensors, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), where)
    named = {
        "dictionary.W_enc": weight.T,
        "dictionary.b_enc": bias,
        "dictionary.W_dec": W_dec,
        "dictionary.b_dec": b_dec,
    }
    metadata = {"hook_name": hook_name, "source": {"format": "sparsify"}}
    return linear_sae(where, "topk", named, metadata, k=int(k), apply_b_dec_to_input=True)
