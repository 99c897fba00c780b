"""Training steps as others write them, in plain torch: each returns a loss to be differentiated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dense(nn.Module):
    """Encoder and decoder tables of a TopK autoencoder."""

    def __init__(self, d_in: int, d_sae: int, k: int, device: torch.device) -> None:
        super().__init__()
        self.k = k
        self.W_dec = nn.Parameter(F.normalize(torch.randn(d_sae, d_in, device=device), dim=1))
        self.W_enc = nn.Parameter(self.W_dec.detach().T.clone())
        self.b_enc = nn.Parameter(torch.zeros(d_sae, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_in, device=device))


class SAELensTopK(Dense):
    """SAELens' TopK training step: dense codes, dense decoder product."""

    def forward(self, x: Tensor) -> Tensor:
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        values, places = pre.topk(self.k, dim=-1)
        codes = torch.zeros_like(pre).scatter(-1, places, values.relu())
        recons = codes @ self.W_dec + self.b_dec
        return (recons.float() - x).square().sum(-1).mean()


class SparsifyTopK(Dense):
    """sparsify's TopK step: the k selected latents are decoded by gathering rows."""

    def forward(self, x: Tensor) -> Tensor:
        pre = ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()
        values, places = pre.topk(self.k, dim=-1, sorted=False)
        recons = F.embedding_bag(places, self.W_dec, per_sample_weights=values.float(), mode="sum") + self.b_dec
        return (recons - x).square().sum() / (x - x.mean(0)).square().sum()


class PublishedSparsemax(nn.Module):
    """The published Sparsemax SAE step, written plainly: keys and values made, scores sorted, codes dense."""

    def __init__(self, concepts: Tensor, key_scale: float) -> None:
        super().__init__()
        width = concepts.shape[1]
        eye = torch.eye(width, device=concepts.device)
        self.concept = nn.Parameter(concepts.clone())
        self.k = nn.Parameter(eye * key_scale)
        self.v = nn.Parameter(eye.clone())

    def forward(self, x: Tensor) -> Tensor:
        norm = x.norm(dim=1, keepdim=True)
        scores = (x / norm) @ (self.concept @ self.k).T
        codes = scores * (SortedSparsemax.apply(scores) > 0)
        recons = norm * (codes @ (self.concept @ self.v))
        return 10 * ((recons.float() - x).square() / norm).mean()


class SortedSparsemax(torch.autograd.Function):
    """Sparsemax by a full sort, with its dense Jacobian. Source: arXiv:1602.02068, Alg. 1."""

    @staticmethod
    def forward(ctx, scores):
        shifted = scores.float() - scores.float().amax(1, keepdim=True)
        ordered = shifted.sort(dim=1, descending=True).values
        rank = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=torch.float32)
        excess = ordered.cumsum(1) - 1
        size = (rank * ordered > excess).sum(1, keepdim=True)
        weights = (shifted - excess.gather(1, size - 1) / size).clamp(min=0)
        ctx.save_for_backward(weights)
        return weights.to(scores.dtype)

    @staticmethod
    def backward(ctx, grad):
        (weights,) = ctx.saved_tensors
        inside = weights > 0
        mean = (grad * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True)
        return inside * (grad - mean)
