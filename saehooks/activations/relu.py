"""The relu family: relu, gated and jumprelu. Sparsity comes from a penalty, not from the activation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from saehooks.activations.base import Activation
from saehooks.errors import ConfigError
from saehooks.kernels import Support, Threshold

START_ROWS = 1024
"""Rows by which ``start_l0`` sets thresholds."""


class ReLUActivation(Activation):
    """Select every positive score. Source: Bricken et al. 2023, Towards Monosemanticity."""

    name: ClassVar[str] = "relu"
    default_loss: ClassVar[Mapping[str, Any]] = MappingProxyType({"l1": 0.02})

    def rule(self, rows: int = 1, density: Tensor | None = None) -> Threshold:
        return Threshold(0.0)


class GatedActivation(Activation):
    """A gate says which latents are on, magnitudes are learned apart: [s + b_gate > 0] relu(exp(r_mag) s + b_mag).

    Gates and magnitudes share the scores; the gate learns from the l1 penalty on relu(s + b_gate) and from the
    auxiliary reconstruction of the loss term ``gate``. A latent whose gate is open is selected, also where its
    magnitude is 0. Source: Rajamanoharan et al. 2024, arXiv:2404.16014.
    """

    name: ClassVar[str] = "gated"
    default_loss: ClassVar[Mapping[str, Any]] = MappingProxyType({"l1": 0.02, "gate": 1.0})
    by_latent: ClassVar[Mapping[str, int]] = MappingProxyType({"b_gate": 0, "b_mag": 0, "r_mag": 0})

    def __init__(self, d_sae: int) -> None:
        super().__init__(d_sae)
        self.b_gate = nn.Parameter(torch.zeros(d_sae, dtype=torch.float32))
        self.b_mag = nn.Parameter(torch.zeros(d_sae, dtype=torch.float32))
        self.r_mag = nn.Parameter(torch.zeros(d_sae, dtype=torch.float32))

    def rule(self, rows: int = 1, density: Tensor | None = None) -> Threshold:
        return Threshold(-self.b_gate.detach())

    def values(self, scores: Tensor, support: Support) -> Tensor:
        latents = support.indices
        return (self.r_mag[latents].exp() * scores + self.b_mag[latents]).relu()

    def penalised(self, scores: Tensor, support: Support, values: Tensor) -> Tensor:
        """(nnz,) what opens the gates: relu(s + b_gate)."""
        return (scores + self.b_gate[support.indices]).relu()


class JumpReLUActivation(Activation):
    """Scores above a learned threshold, as they are: a = s [s > theta], theta = exp(log_theta), one for each latent.

    Thresholds learn by the straight-through rectangle kernel, from scores within half a bandwidth of them. So in
    train mode scores down to theta - bandwidth / 2 are selected too; they carry the value 0 in the reconstruction,
    and are no part of the codes: L0, firing counts and everything in eval mode see s > theta only.

    Args:
        threshold, bandwidth: in units of the scale of the activations (the root mean square of the norm of what is
            multiplied with the keys, taken from the first data; 1 before).
        start_l0: start the thresholds, from the first data, where this many latents of a row are active on average.
        given: the thresholds are those of a file, in the buffer ``given_theta``, and exactly these until they are
            trained: theta = given_theta * exp(log_theta), with log_theta 0 at first. They may be 0.
    Source: Rajamanoharan et al. 2024, arXiv:2407.14435.
    """

    name: ClassVar[str] = "jumprelu"
    default_loss: ClassVar[Mapping[str, Any]] = MappingProxyType({"l0": 0.001})
    by_latent: ClassVar[Mapping[str, int]] = MappingProxyType({"log_theta": 0, "given_theta": 0})
    unit: Tensor
    given_theta: Tensor

    def __init__(
        self,
        d_sae: int,
        *,
        threshold: float = 0.001,
        bandwidth: float = 0.001,
        start_l0: float | None = None,
        given: bool = False,
    ) -> None:
        super().__init__(d_sae)
        if threshold <= 0 or bandwidth <= 0:
            raise ConfigError(f"threshold and bandwidth must be positive, got {threshold} and {bandwidth}")
        if start_l0 is not None and not 0 < start_l0 <= d_sae:
            raise ConfigError(f"start_l0 must lie in 0 .. d_sae, got {start_l0} with d_sae={d_sae}")
        self.threshold, self.bandwidth, self.start_l0 = threshold, bandwidth, start_l0
        self.given = given
        start = 0.0 if given else math.log(threshold)
        self.log_theta = nn.Parameter(torch.full((d_sae,), start, dtype=torch.float32))
        if given:
            self.register_buffer("given_theta", torch.full((d_sae,), threshold, dtype=torch.float32))
        self.register_buffer("unit", torch.ones((), dtype=torch.float32))

    @property
    def theta(self) -> Tensor:
        """(d_sae,) thresholds."""
        return self.given_theta * self.log_theta.exp() if self.given else self.log_theta.exp()

    @property
    def width(self) -> Tensor:
        """Scalar, the bandwidth in units of the scores."""
        return self.bandwidth * self.unit

    def rule(self, rows: int = 1, density: Tensor | None = None) -> Threshold:
        theta = self.theta.detach()
        return Threshold(theta - self.width / 2 if self.training else theta)

    def values(self, scores: Tensor, support: Support) -> Tensor:
        return _Jump.apply(scores, self.theta[support.indices], self.width)

    def active(self, scores: Tensor, support: Support) -> Tensor | None:
        # "Not below" keeps NaN, so that a broken row stays visible.
        return ~(scores <= self.theta[support.indices]) if self.training else None

    def count(self, scores: Tensor, support: Support) -> Tensor:
        return _Step.apply(scores, self.theta[support.indices], self.width)

    @torch.no_grad()
    def initialise(self, queries: Tensor, scores: Callable[[], Iterable[Tensor]]) -> None:
        if not queries.shape[0]:
            return
        self.unit.copy_(queries.square().sum(1).mean().sqrt())
        start = self.threshold * self.unit
        if self.start_l0 is not None:
            rows = min(len(queries), START_ROWS)
            count = max(1, min(rows * self.d_sae, round(rows * self.start_l0) + 1))
            start = self.largest(scores(), rows, count)[-1].clamp(min=float(start))
        self.log_theta.fill_(float(start.log()))
        if self.given:
            self.given_theta.fill_(1.0)

    def largest(self, scores: Iterable[Tensor], rows: int, count: int) -> Tensor:
        """(count,) the largest scores of the first rows, descending.

        Args:
            scores: dense, in chunks (chunk, d_sae) of which each overwrites the last.
            rows: how many of them are looked at.
            count: at most rows * d_sae.
        """
        best: Tensor | None = None
        for chunk in scores:
            found = chunk[:rows].flatten()
            found = found.clone() if best is None else torch.cat([best, found])
            best, rows = found.topk(min(count, len(found))).values, rows - len(chunk)
            if rows <= 0:
                break
        if best is None:
            raise ConfigError("start_l0 needs activations to start the thresholds from; there were none")
        return best

    def extra_repr(self) -> str:
        return f"d_sae={self.d_sae}, threshold={self.threshold}, bandwidth={self.bandwidth}"


class _Jump(torch.autograd.Function):
    """s [s > theta]; theta's gradient is ``-theta / width`` where s lies within half a width of it."""

    @staticmethod
    def forward(ctx, scores, theta, width):
        ctx.save_for_backward(scores, theta, width)
        return torch.where(scores <= theta, 0.0, scores)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scores, theta, width = ctx.saved_tensors
        near = (scores - theta).abs() < width / 2
        return torch.where(scores <= theta, 0.0, grad), torch.where(near, -theta / width * grad, 0.0), None


class _Step(torch.autograd.Function):
    """[s > theta]; theta's gradient is ``-1 / width`` where s lies within half a width of it, s has none."""

    @staticmethod
    def forward(ctx, scores, theta, width):
        ctx.save_for_backward(scores, theta, width)
        return (scores > theta).to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scores, theta, width = ctx.saved_tensors
        near = (scores - theta).abs() < width / 2
        return None, torch.where(near, -grad / width, 0.0), None
