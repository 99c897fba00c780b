"""Checkpoints of the authors of the Sparsemax SAE: a pickle of ``cfg`` and ``state_dict``, read without running it.

``concept`` is the table C, ``k`` and ``v`` the two square maps: keys C k, values C v, scores x / |x| . key, the scores
themselves on the sparsemax support, and the reconstruction times |x|. The file also holds weights that the code never
uses (W_enc, b_enc, W_dec, b_dec, log_threshold). The running mean that silences over-frequent latents is not in it.
Source: the authors' code, commit 2192e4c, ``src/sae_training/sparse_autoencoder.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from saehooks.errors import FormatError
from saehooks.formats.archives import open_torch_file
from saehooks.formats.contents import Contents
from saehooks.formats.pickles import attributes_of
from saehooks.sae import SAEConfig, SparseCoder, without_memory

UNUSED = "W_enc b_enc W_dec b_dec log_threshold"


def load(path: str | Path, *, hook_name: str | None = None, dtype: torch.dtype = torch.float32) -> SparseCoder:
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
    return read(open_torch_file(path), Path(path), hook_name=hook_name, dtype=dtype)


def is_one(found: Any) -> bool:
    """Whether what a file holds is such a checkpoint."""
    state = found.get("state_dict") if isinstance(found, dict) else None
    return isinstance(state, dict) and {"concept", "k", "v"} <= set(state)


def read(
    found: Any,
    path: Path,
    *,
    hook_name: str | None = None,
    dtype: torch.dtype = torch.float32,
    ignore: Iterable[str] = (),
) -> SparseCoder:
    """The SAE of what such a file holds."""
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        raise FormatError(f"{path} is no checkpoint of the Sparsemax SAE: expected a pickle of 'cfg' and 'state_dict'")
    contents = Contents(str(path), {}, found["state_dict"], ignore)
    concept = contents.tensor("concept", "d_sae", "d_in")
    maps = [contents.tensor(name, "d_in", "d_in") for name in ("k", "v")]
    contents.skip(UNUSED)
    contents.finish()
    values = attributes_of(found.get("cfg"))
    cfg = {name: value for name, value in values.items() if isinstance(value, str | int | float | bool)}
    site = hook_name or _site(cfg)
    model = cfg.get("model_name") if isinstance(cfg.get("model_name"), str) else None
    known = {"hook_name": site, "model_name": model}
    metadata: dict[str, Any] = {name: value for name, value in known.items() if value is not None}
    metadata["source"] = {"format": "sparsemax_sae", "file": path.name, "cfg": cfg}
    settings = {"center": False, "eps": 0.0, "values": "score"}
    d_sae, d_in = concept.shape
    sae = without_memory(SAEConfig(d_in, d_sae, "concepts", "sparsemax", settings, str(dtype)[6:], metadata), str(path))
    named = dict(zip(("C", "W_k", "W_v"), (concept, *maps), strict=True))
    sae.adopt({f"dictionary.{name}": stored.read().to(dtype) for name, stored in named.items()}, str(path))
    return sae


def _site(cfg: dict[str, Any]) -> str | None:
    """The site of a CLIP checkpoint: the residual stream after the block it names, counted from the end if negative."""
    layer = cfg.get("block_layer")
    if cfg.get("module_name") != "resid" or not isinstance(layer, int) or layer < 0:
        return None
    return f"visual.blocks.{layer}.hook_resid_post"
