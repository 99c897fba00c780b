"""What the recipes on language models share: the codes of a whole text."""

from __future__ import annotations

import torch

import saehooks as sh
from saehooks.hosts import host


def codes_of(model, sae: sh.SAE, batches: sh.TokenBatches) -> sh.Codes:
    """Codes of shape (sequences, positions) at the SAE's own site; each forward stops there."""
    source, parts = host(model), []
    site = source.site(sae.hook_name)
    for tokens in batches:
        with torch.no_grad(), sh.read(model, sae) as trace, source.stop_at(site):
            source.run(tokens)
        parts.append(trace.codes)
    return sh.Codes.cat(parts)


def counts_of(codes: sh.Codes) -> torch.Tensor:
    """(d_sae,) tokens on which each latent fires; position 0, an attention sink, is left out."""
    return torch.bincount(codes.indices[codes.rows % codes.shape[1] > 0], minlength=codes.d_sae)
