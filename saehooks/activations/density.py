"""How often each latent fires, and silencing those that fire too often."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from saehooks.errors import ConfigError

HORIZON = 1_000_000
"""Rows after which old counts are halved, so that densities follow the training."""


class LatentDensity(nn.Module):
    """Running share of rows in which each latent fired: saved with the SAE, updated in train mode only.

    Args:
        d_sae: number of latents.
        track_density: keep the counts, for losses and rankings that need them.
        max_density: a latent that fired in more than this share of the rows so far has its score set to 0 before
            selection. The authors of the Sparsemax SAE use 0.1 while training, evaluation included; here the mask
            is off by default, and in eval mode it stays as training left it.
    """

    by_latent: ClassVar[Mapping[str, int]] = MappingProxyType({"fired": 0})
    """Names of the tensors that hold something for each latent, with the axis along which latents lie."""
    fired: Tensor
    rows: Tensor

    def __init__(self, d_sae: int, *, track_density: bool = False, max_density: float | None = None) -> None:
        super().__init__()
        if max_density is not None and not 0 < max_density <= 1:
            raise ConfigError(f"max_density is a share of rows, above 0 and at most 1, got {max_density}")
        self.tracked, self.max_density = track_density or max_density is not None, max_density
        if self.tracked:
            self.register_buffer("fired", torch.zeros(d_sae, dtype=torch.int64))
            self.register_buffer("rows", torch.zeros((), dtype=torch.int64))

    @property
    def mean(self) -> Tensor | None:
        """(d_sae,) float32 share of rows in which each latent fired, 0 before any training; None if not tracked."""
        return self.fired.float() / self.rows.clamp(min=1) if self.tracked else None

    @property
    def silenced(self) -> Tensor | None:
        """(d_sae,) bool, latents whose scores are set to 0; None if there are none (on a GPU, if there can be none)."""
        if self.max_density is None:
            return None
        silenced = self.fired > self.max_density * self.rows
        return silenced if silenced.device.type != "cpu" or bool(silenced.any()) else None

    @torch.no_grad()
    def update(self, counts: Tensor, rows: int) -> None:
        """Add a batch of ``rows`` rows: ``counts`` (d_sae,) int64, in how many of them each latent fired."""
        if not self.tracked:
            return
        self.fired += counts
        self.rows += rows
        full = (self.rows > HORIZON).long()  # decided on the device: the host need not wait
        self.fired.bitwise_right_shift_(full)
        self.rows.bitwise_right_shift_(full)
