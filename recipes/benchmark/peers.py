"""Training steps of others: their packages where these are installed, their algorithms in plain torch where not.

Each is a `Peer`: parameters, the loss of a batch, and what is done to the gradients before the optimiser's update.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Peer(NamedTuple):
    """A training step up to the optimiser's update."""

    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    """Activations (rows, d_in) in, a scalar to be differentiated out."""
    adjust: Callable[[], object] = lambda: None
    """Called between backward and update."""
    autocast: bool = True
    """Whether it may be run in half precision."""


# -------------------------------------------------------------------- packages


def sae_lens_topk(
    d_in: int, d_sae: int, k: int, device: torch.device, *, sparse: bool = False, rescale: bool = False
) -> Peer:
    """SAELens's own training forward pass and loss, without dead latents and so without an auxiliary loss.

    Rescaling by decoder norms is its default and costs time; with sparse activations its backward lacks it on CPU.
    Its trainer clips gradients to norm 1. Package sae-lens, 6.x.
    """
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    settings = {"use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": rescale, "device": str(device)}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, **settings))

    def loss(x: Tensor) -> Tensor:
        given = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
        )
        return sae.training_forward_pass(given).loss

    # "Only worthwhile if using float32 and not using autocast", it says of sparse activations.
    return Peer(sae, loss, lambda: nn.utils.clip_grad_norm_(sae.parameters(), 1.0), autocast=not sparse)


def sparsify_topk(d_in: int, d_sae: int, k: int, device: torch.device) -> Peer:
    """sparsify's own coder and loss; its trainer keeps the decoder's rows at norm 1. Package eai-sparsify, 1.3."""
    if device.type != "cuda":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its decoder's kernel needs a GPU
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), device=device)

    def adjust() -> None:
        coder.remove_gradient_parallel_to_decoder_directions()
        coder.set_decoder_norm_to_unit_norm()

    return Peer(coder, lambda x: coder(x).fvu, adjust)


# ------------------------------------------------------ algorithms in plain torch


class Tables(nn.Module):
    """Encoder and decoder of a TopK autoencoder, one row of each a latent."""

    def __init__(self, d_in: int, d_sae: int, device: torch.device) -> None:
        super().__init__()
        self.W_dec = nn.Parameter(F.normalize(torch.randn(d_sae, d_in, device=device), dim=1))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(d_sae, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_in, device=device))


def plain_sae_lens_topk(d_in: int, d_sae: int, k: int, device: torch.device) -> Peer:
    """SAELens's TopK step: dense codes, a dense product to decode them, dense gradients."""
    tables = Tables(d_in, d_sae, device)

    def loss(x: Tensor) -> Tensor:
        pre = (x - tables.b_dec) @ tables.W_enc.T + tables.b_enc
        values, places = pre.topk(k, dim=-1, sorted=False)
        codes = torch.zeros_like(pre).scatter(-1, places, values.relu())
        recons = codes @ tables.W_dec + tables.b_dec
        return (recons.float() - x).square().sum(-1).mean()

    return Peer(tables, loss)


def plain_sparsify_topk(d_in: int, d_sae: int, k: int, device: torch.device) -> Peer:
    """sparsify's TopK step: dense scores and torch.topk, then sparse sums forward and backward."""
    tables = Tables(d_in, d_sae, device)

    def loss(x: Tensor) -> Tensor:
        values, places = TopKEncoder.apply(x - tables.b_dec, tables.W_enc, tables.b_enc, k)
        weights = values.to(tables.W_dec.dtype)
        recons = F.embedding_bag(places, tables.W_dec, per_sample_weights=weights, mode="sum") + tables.b_dec
        return (recons - x).square().sum() / (x - x.mean(0)).square().sum()

    return Peer(tables, loss)


class TopKEncoder(torch.autograd.Function):
    """The k largest scores of each row; gradients touch the selected latents alone. Source: sparsify's encoder."""

    @staticmethod
    def forward(ctx, x, weight, bias, k):
        values, places = F.linear(x, weight, bias).relu().topk(k, dim=-1, sorted=False)
        ctx.save_for_backward(x, weight, places)
        ctx.mark_non_differentiable(places)
        return values, places

    @staticmethod
    def backward(ctx, grad, _):
        x, weight, places = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        d_x = F.embedding_bag(places, weight, per_sample_weights=grad, mode="sum")
        parts = (grad[:, :, None] * x[:, None, :]).reshape(-1, x.shape[1])
        d_weight = torch.zeros_like(weight).index_add_(0, places.reshape(-1), parts)
        d_bias = weight.new_zeros(weight.shape[0]).index_add_(0, places.reshape(-1), grad.reshape(-1))
        return d_x, d_weight, d_bias, None


class PublishedSparsemax(nn.Module):
    """The Sparsemax SAE as published code has it: dense cross-attention, sorted sparsemax, raw scores as values.

    Args:
        concepts: (d_sae, d_in), what is trained starts at a copy of it.
        key_scale: of the keys.
    """

    def __init__(self, concepts: Tensor, key_scale: float) -> None:
        super().__init__()
        eye = torch.eye(concepts.shape[1], device=concepts.device)
        self.concept = nn.Parameter(concepts.clone())
        self.k, self.v = nn.Parameter(eye * key_scale), nn.Parameter(eye.clone())

    def forward(self, x: Tensor) -> Tensor:
        norm = x.norm(dim=1, keepdim=True)
        keys, values = self.concept @ self.k, self.concept @ self.v
        scores = (x / norm) @ keys.T
        ordered = scores.detach().sort(dim=1, descending=True).values
        excess = ordered.cumsum(1, dtype=torch.float32) - 1
        rank = torch.arange(1, scores.shape[1] + 1, device=x.device, dtype=torch.float32)
        size = (rank * ordered > excess).sum(1, keepdim=True)
        chosen = scores > excess.gather(1, size - 1) / size
        return norm * ((scores * chosen) @ values)


def published_sparsemax(concepts: Tensor, key_scale: float) -> Peer:
    """The published step with its loss, 10 times the squared error over the activation's norm."""
    model = PublishedSparsemax(concepts, key_scale)
    return Peer(model, lambda x: 10 * ((model(x).float() - x).square() / x.norm(dim=1, keepdim=True)).mean())


PLAIN: dict[str, Callable[..., Peer]] = {
    "SAELens TopK, plain torch": plain_sae_lens_topk,
    "sparsify TopK, plain torch": plain_sparsify_topk,
}
PACKAGES: dict[str, Callable[..., Peer]] = {
    "SAELens TopK": sae_lens_topk,
    "SAELens TopK, rescaled": lambda *sizes: sae_lens_topk(*sizes, rescale=True),
    "SAELens TopK, sparse": lambda *sizes: sae_lens_topk(*sizes, sparse=True),
    "sparsify TopK": sparsify_topk,
}
"""Makers of the peers, each of (d_in, d_sae, k, device); a package that is missing raises ImportError."""
