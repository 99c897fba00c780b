"""What training minimises: a reconstruction term, and the penalties and auxiliary terms an activation asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saehooks.errors import ConfigError
from saehooks.sae import SAE, Encoded

RECONSTRUCTION = ("relative", "mse", "per_norm")


@dataclass(frozen=True)
class LossConfig:
    """Which terms the training loss has."""

    reconstruction: str = "relative"
    """See `reconstruction`."""

    def __post_init__(self) -> None:
        if self.reconstruction not in RECONSTRUCTION:
            raise ConfigError(f"reconstruction={self.reconstruction!r}: choose one of {', '.join(RECONSTRUCTION)}")


def default_loss(sae: SAE) -> LossConfig:
    """The loss that goes with an SAE's activation, where the user names none."""
    return LossConfig(**getattr(sae.activation, "default_loss", {}))


class TrainingLoss(NamedTuple):
    """The loss of one batch and what it was made from."""

    total: Tensor
    """Scalar, to be differentiated."""
    terms: dict[str, Tensor]
    """Each term, detached, by name; they add up to the total."""
    recons: Tensor
    """(rows, d_in), detached."""
    stages: Encoded
    """The stages of encoding, with codes."""


def training_loss(sae: SAE, x: Tensor, config: LossConfig, *, idle: Tensor | None = None) -> TrainingLoss:
    """Encode, decode and score one batch.

    Args:
        sae: in train mode.
        x: (rows, d_in) activations in the dtype of the SAE.
        config: which terms.
        idle: (d_sae,) int64, rows seen since each latent last fired, for terms about dead latents.
    """
    stages = sae.encode_stages(x)
    recons = sae.decode(stages.codes)
    terms = {config.reconstruction: reconstruction(x, recons, config.reconstruction, sae.dictionary.offset)}
    total = torch.stack(list(terms.values())).sum()
    return TrainingLoss(total, {name: term.detach() for name, term in terms.items()}, recons.detach(), stages)


def reconstruction(x: Tensor, recons: Tensor, kind: str = "relative", center: Tensor | None = None) -> Tensor:
    """Scalar reconstruction loss of rows (rows, d_in).

    Args:
        x, recons: activations and their reconstruction.
        kind: ``"relative"``: each row's squared error over its squared norm, so every token counts alike;
            ``"mse"``: summed squared error over summed squared norm of the batch;
            ``"per_norm"``: ``10 * mean((recons - x)^2 / |x|)``, as in the authors' code of the Sparsemax SAE.
        center: (d_in,) subtracted from x before the norms of ``"relative"`` and ``"mse"`` are taken.
    """
    error = (recons - x).square()
    if kind == "per_norm":
        return 10.0 * (error / x.norm(dim=1, keepdim=True).clamp(min=1e-12)).mean()
    energy = (x if center is None else x - center).detach().square().sum(1)
    if kind == "relative":
        return (error.sum(1) / energy.clamp(min=1e-12)).mean()
    if kind == "mse":
        return error.sum() / energy.sum().clamp(min=1e-12)
    raise ConfigError(f"loss {kind!r}: choose one of {', '.join(RECONSTRUCTION)}")
