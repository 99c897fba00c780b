"""Which latents fire at the same positions, and which point the same way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saehooks.precision import widened
from saehooks.support import offsets_of

EXACT_UP_TO = 8192
"""Latents up to which all pairs are counted: 268 MB."""
SIGNS = 256
"""Length of the random signatures that stand in for the pairs of a larger SAE."""
PAIRS_AT_ONCE = 2**22
"""Pairs counted of one batch; of a batch with more, a sample of its positions is."""
SCORES_AT_ONCE = 2**24


class Neighbours(NamedTuple):
    """The latents most like each latent."""

    latents: Tensor
    """(d_sae, n) int64, most alike first; -1 where there is none."""
    similarity: Tensor
    """(d_sae, n) float32, a cosine; 0 where there is none."""


class CoFiring:
    """Counts how often two latents fire together: every pair up to 8,192 latents, estimated beyond.

    The similarity of two latents is ``n_ij / sqrt(n_i n_j)``, the cosine of their firing patterns. Beyond 8,192 latents
    each position gets 256 random signs and each latent the sum of those where it fires: the cosine of two such sums
    estimates theirs with a standard error of 0.06.
    """

    def __init__(self, d_sae: int, device: torch.device | str | None = None) -> None:
        self.exact = d_sae <= EXACT_UP_TO
        width, dtype = (d_sae, torch.int32) if self.exact else (SIGNS, torch.float32)
        self.table = torch.zeros(d_sae, width, dtype=dtype, device=device)

    def add(self, rows: Tensor, latents: Tensor, n_rows: int, seed: int) -> None:
        """Count the entries of one batch: rows (nnz,) ascending, latents (nnz,); ``seed`` is the batch's own."""
        if not len(rows):
            return
        if not self.exact:
            generator = torch.Generator().manual_seed(seed)
            signs = torch.randint(0, 2, (n_rows, SIGNS), generator=generator, dtype=torch.int8)
            signs = (signs * 2 - 1).to(self.table)
            for part in torch.arange(len(rows), device=rows.device).split(2**16):
                self.table.index_add_(0, latents[part], signs[rows[part]])
            return
        sizes = torch.bincount(rows, minlength=n_rows)
        rows, latents, sizes = self._sampled(rows, latents, sizes, seed)
        offsets, mine = offsets_of(sizes), sizes[rows]
        first = torch.repeat_interleave(latents, mine)
        before = torch.repeat_interleave(mine.cumsum(0) - mine, mine)
        place = torch.arange(len(first), device=rows.device) - before + torch.repeat_interleave(offsets[rows], mine)
        pairs = first * self.table.shape[1] + latents[place]
        self.table.view(-1).index_add_(0, pairs, torch.ones_like(pairs, dtype=torch.int32))

    def _sampled(self, rows: Tensor, latents: Tensor, sizes: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """The entries of as many rows, drawn at random, as give few enough pairs."""
        if int((sizes**2).sum()) <= PAIRS_AT_ONCE:
            return rows, latents, sizes
        order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).to(sizes.device)
        fits = (sizes[order] ** 2).cumsum(0) <= PAIRS_AT_ONCE
        fits[0] = True
        kept = torch.zeros_like(sizes, dtype=torch.bool)
        kept[order[fits]] = True
        return rows[kept[rows]], latents[kept[rows]], torch.where(kept, sizes, 0)

    def neighbours(self, n: int) -> Neighbours:
        """The n latents that fire most often with each, of those that ever did."""
        if not self.exact:
            return nearest(self.table, n)
        fired = widened(self.table.diagonal()).sqrt()
        scale = torch.where(fired > 0, 1 / fired, 0.0).float()

        def similarity(part: Tensor) -> Tensor:
            return self.table[part].float() * scale[part, None] * scale

        return _best(similarity, len(self.table), n, self.table.device)


def nearest(vectors: Tensor, n: int) -> Neighbours:
    """The n rows of a table (rows, width) with the largest cosine to each row, itself left out."""
    unit = torch.nn.functional.normalize(vectors.float(), dim=1)
    return _best(lambda part: unit[part] @ unit.T, len(unit), n, unit.device)


def _best(similarity, rows: int, n: int, device: torch.device) -> Neighbours:
    """The best n columns of each row of a square table made in chunks; only positive ones count."""
    n = min(n, rows - 1)
    latents = torch.full((rows, n), -1, dtype=torch.int64, device=device)
    found = torch.zeros(rows, n, device=device)
    for part in torch.arange(rows, device=device).split(max(1, SCORES_AT_ONCE // rows)):
        scores = similarity(part)
        scores[torch.arange(len(part), device=device), part] = -1.0
        best = scores.topk(n, dim=1)
        latents[part] = torch.where(best.values > 0, best.indices, -1)
        found[part] = best.values.clamp(min=0)
    return Neighbours(latents, found)
