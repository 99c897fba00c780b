"""Codes over all latents from the codes of each rank's own, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saehooks.codes import Codes
from saehooks.ranks.grid import Alone, Ranks
from saehooks.ranks.products import sum_of_gradients
from saehooks.support import offsets_of


def all_codes(codes: Codes, ranks: Alone) -> Codes:
    """Codes over all latents, on every rank, from the codes of each rank's own; differentiable."""
    if not isinstance(ranks, Ranks) or ranks.latents == 1:
        return codes
    codes, d_sae = codes.trimmed(), codes.d_sae * ranks.latents
    own = codes.rows * d_sae + codes.indices + ranks.latent_rank * codes.d_sae
    counts = [int(n) for n in ranks.gathered_latents(torch.tensor([len(own)], device=own.device))]
    place = torch.cat(_pieces(own, counts, ranks))
    order = place.argsort()
    values, place = _Gathered.apply(codes.values, counts, ranks)[order], place[order]
    row = place // d_sae
    offsets = offsets_of(torch.bincount(row, minlength=codes.offsets.numel() - 1))
    return Codes(place - row * d_sae, values, offsets, codes.shape, d_sae, codes.scale, shift=codes.shift)


def own_codes(codes: Codes, ranks: Ranks) -> Codes:
    """The part of codes over all latents that this rank decodes; every entry gets the gradients of all ranks."""
    n = codes.d_sae // ranks.latents
    codes = codes.with_values(sum_of_gradients(codes.values, ranks)).trimmed()
    own = codes.keep(codes.indices // n == ranks.latent_rank)
    indices = own.indices - n * ranks.latent_rank
    return Codes(indices, own.values, own.offsets, own.shape, n, own.scale, shift=own.shift)


def _pieces(tensor: Tensor, counts: list[int], ranks: Ranks) -> list[Tensor]:
    """Of each rank that shares rows, so many entries."""
    padded = tensor.new_zeros(max(counts))
    padded[: len(tensor)] = tensor
    return [piece[:n] for piece, n in zip(ranks.gathered_latents(padded), counts, strict=True)]


class _Gathered(torch.autograd.Function):
    """The entries of all ranks, one after the other; own ones get the gradient of their places."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, counts: list[int], ranks: Ranks) -> Tensor:
        ctx.place = sum(counts[: ranks.latent_rank]), len(values)
        return torch.cat(_pieces(values.detach(), counts, ranks))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.narrow(0, *ctx.place), None, None
