"""A hash that differs between SAEs."""

from __future__ import annotations

import hashlib

import torch

from saehooks.sparse_coder import SparseCoder

LOOKED_AT = 4096
"""Numbers of each tensor."""


@torch.no_grad()
def fingerprint(sae: SparseCoder) -> str:
    """A hash of an SAE's kind and of evenly spaced numbers of each of its tensors."""
    found = hashlib.sha256(f"{sae.cfg.dictionary} {sae.cfg.activation} {sorted(sae.cfg.settings.items())}".encode())
    for name, tensor in sorted(sae.state_dict().items()):
        flat = tensor.reshape(-1)
        some = flat[:: max(1, flat.numel() // LOOKED_AT)].cpu().double().contiguous()
        found.update(f"{name} {tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    return found.hexdigest()[:16]
