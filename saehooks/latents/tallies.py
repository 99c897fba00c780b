"""How often each latent fires and how strongly: counts, extremes and a histogram, in memory that does not grow."""

from __future__ import annotations

import torch
from torch import Tensor

from saehooks.precision import widened, widest

OCTAVES, PER_OCTAVE = 16, 32
"""A histogram spans a factor of 2**16 below a latent's largest value, in steps of 2**(1/32): 2.2%."""
BINS = OCTAVES * PER_OCTAVE

GRID = 101
"""Quantiles kept of each latent: 0, 1, ... 100%."""

CHUNK = 2**22
"""Histogram cells worked on at a time."""


class Tallies:
    """Running statistics of every latent. The order in which entries arrive does not matter.

    Values are counted in logarithmic bins of each latent's own scale, which moves up when a larger value arrives, so a
    quantile is off by at most a bin: 2.2% of itself (or 2**-16 of the largest value, where it is smaller than that).
    The mean, the smallest and the largest value are exact.
    """

    def __init__(self, d_sae: int, device: torch.device | str | None = None) -> None:
        self.d_sae = d_sae
        self.counts = torch.zeros(d_sae, dtype=torch.int64, device=device)
        """(d_sae,) positions at which each latent was selected."""
        self.sums = torch.zeros(d_sae, dtype=widest(self.counts.device), device=device)
        self.smallest = torch.full((d_sae,), float("inf"), device=device)
        self.largest = torch.full((d_sae,), -float("inf"), device=device)
        self.octave = torch.full((d_sae,), -(2**15), dtype=torch.int64, device=device)
        """(d_sae,) the top bin of a latent ends at 2**octave; very low until it fires."""
        self.positive = torch.zeros(d_sae, BINS, dtype=torch.int32, device=device)
        self.negative = torch.zeros(0, BINS, dtype=torch.int32, device=device)
        """(d_sae, BINS) by magnitude; empty until a negative value is seen, which most SAEs never give."""

    def add(self, latents: Tensor, values: Tensor) -> None:
        """Count entries: latents (n,) int64 and their values (n,), each a latent selected at one position."""
        values = values.float()
        self.counts.index_add_(0, latents, torch.ones_like(latents))
        self.sums.index_add_(0, latents, widened(values))
        self.smallest.scatter_reduce_(0, latents, values, "amin")
        self.largest.scatter_reduce_(0, latents, values, "amax")
        self._raise_scale(latents, values)
        for sign in (1, -1):
            chosen = values * sign > 0
            if sign < 0 and not bool(chosen.any()):
                continue
            if sign < 0 and not len(self.negative):
                self.negative = torch.zeros_like(self.positive)
            which = latents[chosen]
            below = (self.octave[which] - widened(values[chosen].abs()).log2()) * PER_OCTAVE
            places = (BINS - 1 - below.floor().long()).clamp(0, BINS - 1)
            table = self.positive if sign > 0 else self.negative
            flat = which * BINS + places
            table.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))

    def _raise_scale(self, latents: Tensor, values: Tensor) -> None:
        """Move the bins of latents that met a larger magnitude than they have room for."""
        magnitude = torch.zeros_like(self.largest).scatter_reduce_(0, latents, values.abs(), "amax")
        needed = torch.where(magnitude > 0, widened(magnitude).log2().floor().long() + 1, self.octave)
        moving = (needed > self.octave).nonzero()[:, 0]
        if not len(moving):
            return
        steps = ((needed - self.octave)[moving] * PER_OCTAVE).clamp(max=BINS)
        self.octave[moving] = needed[moving]
        target = (torch.arange(BINS, device=steps.device) - steps[:, None]).clamp(min=0)
        for table in (self.positive, self.negative):
            if len(table):
                table[moving] = torch.zeros_like(table[moving]).scatter_add_(1, target, table[moving])

    @property
    def mean(self) -> Tensor:
        """(d_sae,) float64, mean value where selected; NaN for a latent that never was."""
        return self.sums / self.counts

    def quantiles(self) -> Tensor:
        """(d_sae, GRID) float32, the 0, 1, ... 100% quantiles of each latent's values where it was selected; NaN for
        a latent that never was."""
        found = self.largest.new_full((self.d_sae, GRID), float("nan"))
        rows = max(1, CHUNK // (2 * BINS + 1))
        fired = self.counts.nonzero()[:, 0]
        for part in fired.split(rows):
            found[part] = self._quantiles_of(part)
        return found

    def _quantiles_of(self, which: Tensor) -> Tensor:
        positive = self.positive[which].long()
        negative = self.negative[which].long() if len(self.negative) else positive[:, :0]
        zeros = self.counts[which] - positive.sum(1) - negative.sum(1)
        cells = torch.cat([negative.flip(1), zeros[:, None], positive], 1)  # from the lowest value to the highest
        steps = torch.arange(BINS + 1, device=which.device, dtype=widest(which.device)) / PER_OCTAVE - OCTAVES
        edges = (widened(self.octave[which, None]) + steps).exp2()  # (n, BINS + 1), ascending magnitudes
        low = torch.cat(
            [-edges[:, 1:].flip(1) if len(self.negative) else edges[:, :0], edges[:, :1] * 0, edges[:, :-1]], 1
        )
        high = torch.cat(
            [-edges[:, :-1].flip(1) if len(self.negative) else edges[:, :0], edges[:, :1] * 0, edges[:, 1:]], 1
        )
        upto = cells.cumsum(1)

        def of_rank(rank: Tensor) -> Tensor:
            """(n, GRID) the value of a whole rank: values are taken to lie evenly in their bin."""
            place = torch.searchsorted(upto, rank, right=True).clamp(max=cells.shape[1] - 1)
            share = (rank - (upto - cells).gather(1, place) + 0.5) / cells.gather(1, place).clamp(min=1)
            found = low.gather(1, place) + share * (high - low).gather(1, place)
            return torch.maximum(torch.minimum(found, self.largest[which, None]), self.smallest[which, None])

        grid = torch.linspace(0, 1, GRID, device=which.device, dtype=widest(which.device))
        rank = grid * (self.counts[which, None] - 1)
        lower = of_rank(rank.floor().long())
        found = lower + (rank - rank.floor()) * (of_rank(rank.ceil().long()) - lower)
        found[:, 0], found[:, -1] = (widened(end[which]) for end in (self.smallest, self.largest))
        return found.float()

    def state(self) -> dict[str, Tensor]:
        """Everything counted, as tensors of the shapes of the attributes."""
        names = ("counts", "sums", "smallest", "largest", "octave", "positive", "negative")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`, of the same shapes."""
        for name, tensor in state.items():
            setattr(self, name, tensor.to(self.counts.device))
