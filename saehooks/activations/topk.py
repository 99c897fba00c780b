"""TopK: the k largest scores of each token; BatchTopK: of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from saehooks.activations.base import Activation
from saehooks.errors import ConfigError
from saehooks.kernels import BatchTopK, Support, Threshold, TopK
from saehooks.precision import widened

RATE = 0.01
"""Weight of the newest batch in a running threshold, once there were enough for a plain mean to weigh less."""


def check_k(k: int, d_sae: int) -> int:
    """k, if a row can have that many latents."""
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= d_sae:
        raise ConfigError(f"top-k needs a whole 1 <= k <= d_sae, got k={k} with d_sae={d_sae}")
    return k


RANKS: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": torch.abs, "value": torch.clone}


class TopKActivation(Activation):
    """Select the k largest positive scores of each row. Source: Gao et al. 2024, arXiv:2406.04093.

    Args:
        k: latents of a row.
        negative: what becomes of negative scores. ``"drop"``: they are never selected; ``"magnitude"``: the k scores of
            largest magnitude are selected and keep their sign (AbsTopK, arXiv:2510.00404; sparsify's ``signed``);
            ``"value"``: the k largest are selected whatever their sign, and keep it (top-k without a relu).
    """

    name: ClassVar[str] = "topk"
    takes_padding: ClassVar[bool] = True
    default_loss: ClassVar[Mapping[str, Any]] = MappingProxyType({"aux_k": 1 / 32})

    def __init__(self, d_sae: int, *, k: int = 32, negative: str = "drop") -> None:
        super().__init__(d_sae)
        if negative != "drop" and negative not in RANKS:
            raise ConfigError(f"negative={negative!r}: negative scores are for 'drop', 'magnitude' or 'value'")
        self.k, self.negative = check_k(k, d_sae), negative

    def rule(self, rows: int = 1, density: Tensor | None = None) -> TopK:
        return TopK(self.k)

    @property
    def rank(self) -> Callable[[Tensor], Tensor] | None:
        return RANKS.get(self.negative)

    def values(self, scores: Tensor, support: Support) -> Tensor:
        return scores.relu() if self.negative == "drop" else scores

    def check_reselect(self, amount: float) -> None:
        if self.negative != "drop":
            super().check_reselect(amount)
        if isinstance(amount, bool) or not isinstance(amount, int) or not 1 <= amount <= self.k:
            raise ConfigError(f"reselect={amount!r}: write how many of the k={self.k} latents stay, 1 to {self.k}")

    def reselect(self, values: Tensor, support: Support, amount: float) -> Tensor:
        """The ``amount`` largest positive values of each row."""
        rows = support.rows
        order = values.argsort(descending=True, stable=True)
        order = order[rows[order].argsort(stable=True)]  # by row, the largest first
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device) - support.offsets[rows[order]]
        return (place < amount) & ~(values <= 0)

    def extra_repr(self) -> str:
        return f"d_sae={self.d_sae}, k={self.k}, negative={self.negative!r}"


class BatchTopKActivation(Activation):
    """In training, select the k * rows largest positive scores of the batch; in eval mode, those above a threshold.

    The threshold is the running mean of the smallest selected score (plain at first, then exponential with rate 0.01).
    Before any training it is 0. A batch of one row is plain top-k.
    Source: Bussmann et al. 2024, arXiv:2412.06410.
    """

    name: ClassVar[str] = "batchtopk"
    takes_padding: ClassVar[bool] = True
    default_loss: ClassVar[Mapping[str, Any]] = MappingProxyType({"aux_k": 1 / 32})
    running: ClassVar[tuple[str, ...]] = ("threshold",)
    threshold: Tensor
    batches: Tensor

    def __init__(self, d_sae: int, *, k: int = 32) -> None:
        super().__init__(d_sae)
        self.k = check_k(k, d_sae)
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def rule(self, rows: int = 1, density: Tensor | None = None) -> BatchTopK | Threshold:
        return BatchTopK(self.k) if self.training else Threshold(self.threshold)

    @torch.no_grad()
    def observe(self, scores: Tensor, support: Support) -> None:
        smallest = support.threshold.min() if support.threshold.numel() else self.threshold.new_tensor(torch.inf)
        some = smallest.isfinite()  # decided on the device: the host need not wait
        self.batches += some
        rate = (1 / widened(self.batches)).clamp(min=RATE)
        moved = self.threshold.lerp(smallest.to(self.threshold), rate.to(self.threshold))
        self.threshold.copy_(torch.where(some, moved, self.threshold))

    def extra_repr(self) -> str:
        return f"d_sae={self.d_sae}, k={self.k}"
