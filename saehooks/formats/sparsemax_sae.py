"""Checkpoints of the authors of the Sparsemax SAE: a pickle of ``cfg`` and ``state_dict``, read without running it.

``concept`` is the table C, ``k`` and ``v`` the two square maps: keys C k, values C v, scores x / |x| . key, the scores
themselves on the sparsemax support, and the reconstruction times |x|. The file also holds weights that the code never
uses (W_enc, b_enc, W_dec, b_dec, log_threshold). The running mean that silences over-frequent latents is not in it.
Source: the authors' code, commit 2192e4c, ``src/sae_training/sparse_autoencoder.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saehooks.errors import FormatError
from saehooks.formats.unpickling import attributes_of, read_pickle
from saehooks.sae import SAE

USED = ("concept", "k", "v")


def load(path: str | Path, *, hook_name: str | None = None, dtype: torch.dtype = torch.float32) -> SAE:
    """Load a checkpoint (``.pt``, ``.pkl`` or ``.pkl.gz``) exactly: the same codes and reconstructions.

    Args:
        path: the file.
        hook_name: the site, as saehooks names it; taken from the config where that says model and block.
        dtype: what to compute in.
    Returns:
        The SAE in eval mode; its metadata keeps the authors' config.
    Raises:
        FormatError: no such checkpoint, or its tensors do not fit one another. Nothing in the file is ever executed.
    """
    found = read_pickle(path)
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        raise FormatError(f"{path} is no checkpoint of the Sparsemax SAE: expected a pickle of 'cfg' and 'state_dict'")
    concept, k, v = (_tensor(found["state_dict"], name, path) for name in USED)
    d_sae, d_in = concept.shape
    if k.shape != (d_in, d_in) or v.shape != (d_in, d_in):
        raise FormatError(
            f"{path}: concept is {tuple(concept.shape)}, so k and v must be {(d_in, d_in)}, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    cfg = attributes_of(found.get("cfg"))
    sae = SAE(d_in, d_sae, "concepts", "sparsemax", center=False, eps=0.0, values="score", dtype=dtype)
    with torch.no_grad():
        for parameter, tensor in ((sae.dictionary.C, concept), (sae.dictionary.W_k, k), (sae.dictionary.W_v, v)):
            parameter.copy_(tensor)
    sae.cfg.metadata = {
        name: value
        for name, value in {
            "hook_name": hook_name or _site(cfg),
            "model_name": cfg.get("model_name"),
            "source": {"format": "sparsemax_sae", "file": Path(path).name, "cfg": cfg},
        }.items()
        if value is not None
    }
    sae.finished = True
    return sae.eval()


def _tensor(state: dict[str, Any], name: str, path: str | Path) -> Tensor:
    tensor = state.get(name)
    if not isinstance(tensor, Tensor) or tensor.dim() != 2:
        raise FormatError(
            f"{path}: its state_dict has no matrix {name!r}; found {', '.join(map(str, state)) or 'none'}"
        )
    return tensor


def _site(cfg: dict[str, Any]) -> str | None:
    """The site of a CLIP checkpoint: the residual stream after the block it names, counted from the end if negative."""
    layer = cfg.get("block_layer")
    if cfg.get("module_name") != "resid" or not isinstance(layer, int) or layer < 0:
        return None
    return f"visual.blocks.{layer}.hook_resid_post"
