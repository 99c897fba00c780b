"""The Kronecker dictionary: heads of two small encoders, whose outputs meet by a smooth AND."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from saehooks import kernels
from saehooks.dictionaries.base import Prepared, RowDecoder, unit_rows
from saehooks.errors import ConfigError
from saehooks.kernels import DEFAULT, BatchRule, FeatureChoice, RowRule, Step, Support
from saehooks.kernels.reference.across_rows import feature_choice
from saehooks.kernels.reference.select import SCORE_BYTES, join
from saehooks.support import rows_of

SMALLEST = 1e-6
"""Scores below this have the gradient of this score, so that the square root's stays finite."""


class KronDictionary(RowDecoder):
    """Head k scores pair (i, j) by ``sqrt(p_i q_j)`` with ``p = relu(P_k x)``, ``q = relu(Q_k x)``; decoder as linear.

    The encoder has ``heads (m + n) d_in`` parameters instead of ``d_sae d_in``. Latent ``(k m + i) n + j`` is pair
    (i, j) of head k. Scores are never negative. Pairs that cannot be selected are never multiplied. Rows of W_dec
    start as the normalised sum of their two factors' rows, which have norm 1.

    Args:
        m, n: sizes of the two factors of a head.
        heads: d_sae / (m n) if not given.
        subtract_b_dec: encode x - b_dec rather than x.
    Source: KronSAE, arXiv:2505.22255.
    """

    name: ClassVar[str] = "kron"
    by_latent: ClassVar[Mapping[str, int]] = MappingProxyType({"P": 0, "Q": 0, "W_dec": 0})

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        m: int = 4,
        n: int = 4,
        heads: int | None = None,
        subtract_b_dec: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(d_in, d_sae)
        if m < 1 or n < 1:
            raise ConfigError(f"the factors of a head need m >= 1 and n >= 1, got m={m}, n={n}")
        found = d_sae // (m * n) if heads is None else heads
        if found < 1 or found * m * n != d_sae:
            raise ConfigError(
                f"heads of {m} x {n} pairs do not factor d_sae={d_sae}"
                + (f" with heads={heads}" if heads is not None else "")
                + f"; d_sae = heads * m * n, for example {max(1, round(d_sae / (m * n))) * m * n}"
            )
        self.heads, self.m, self.n, self.subtract_b_dec = found, m, n, subtract_b_dec
        self.P = nn.Parameter(unit_rows(found * m, d_in, dtype))
        self.Q = nn.Parameter(unit_rows(found * n, d_in, dtype))
        pairs = self.P.detach().view(found, m, 1, d_in) + self.Q.detach().view(found, 1, n, d_in)
        self.W_dec = nn.Parameter(nn.functional.normalize(pairs.reshape(d_sae, d_in), dim=1))
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=dtype))

    def prepare(self, x: Tensor) -> Prepared:
        """The queries and, where they will be differentiated, the rectified factors of all heads, made once."""
        queries = x - self.b_dec if self.subtract_b_dec else x
        prepared = Prepared(queries, None)
        if not kernels.is_differentiated(queries, self.P, self.Q):
            return prepared
        return prepared._replace(factors=self._factors(prepared))

    def _factors(self, prepared: Prepared) -> Tensor:
        """(rows, heads * m + heads * n), float32 where products would leave float16."""
        if prepared.factors is not None:
            return prepared.factors
        x, keys = self.shared(prepared.queries), torch.cat([self.P, self.Q])
        if keys.dtype.itemsize == 2:
            x, keys = x.float(), keys.float()
        return (x @ keys.T).relu_()

    # ------------------------------------------------------------- selection

    def select(
        self,
        prepared: Prepared,
        rule: RowRule | BatchRule,
        *,
        among: Tensor | None = None,
        silenced: Tensor | None = None,
        step: Step = DEFAULT,
    ) -> Support:
        step = step.exact()  # pairs are counted
        if among is not None or silenced is not None or isinstance(rule, FeatureChoice):
            return self._select_dense(self._factors(prepared).detach(), rule, among, silenced, step)
        if prepared.factors is not None:
            p, q = prepared.factors.detach().split([self.heads * self.m, self.heads * self.n], dim=1)
            p, q = p.unflatten(1, (self.heads, self.m)), q.unflatten(1, (self.heads, self.n))
            return kernels.select_pairs(p, q, rule, step=step)
        step = replace(step, screen_tables=None if self.training else self._screen_tables)
        return kernels.select_pair_products(prepared.queries.detach(), self.P, self.Q, self.heads, rule, step=step)

    def _select_dense(
        self,
        factors: Tensor,
        rule: RowRule | BatchRule,
        among: Tensor | None,
        silenced: Tensor | None,
        step: Step,
    ) -> Support:
        """Selection latent by latent, from few of them, or with some silenced: block by block of rows."""
        latents = torch.arange(self.d_sae, device=factors.device) if among is None else among

        def quieted(scores: Tensor, latents: Tensor) -> Tensor:
            return scores if silenced is None else scores.masked_fill(silenced[latents], 0.0)

        rows = len(factors)
        if isinstance(rule, FeatureChoice):
            block = latents.numel() if among is not None else _room(factors, rows)

            def some(start: int, stop: int) -> Tensor:
                return quieted(self._block(factors, latents[start:stop]), latents[start:stop])

            support = feature_choice(some, rule.budgets, rows, block)
        else:
            chunks = (quieted(scores, latents) for scores in self._chunks(factors, latents))
            if isinstance(rule, kernels.BatchTopK):
                support = kernels.batch_topk(chunks, rule.k * rows, rows, latents.numel(), factors.device)
            else:
                support = join([kernels.select_rows(chunk, rule, step=step) for chunk in chunks], factors)
        return support.renamed(latents, self.d_sae).with_scores(None)

    def _block(self, factors: Tensor, latents: Tensor) -> Tensor:
        """(rows, n) scores of some latents."""
        p, q = self._places(latents)
        return (factors[:, p] * factors[:, q]).sqrt()

    def _places(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Where the two factors of each latent are."""
        pair, j = latents // self.n, latents % self.n
        return pair, self.heads * self.m + (pair // self.m) * self.n + j

    def score_chunks(self, prepared: Prepared) -> Iterator[Tensor]:
        factors = self._factors(prepared).detach()
        return self._chunks(factors, torch.arange(self.d_sae, device=factors.device))

    def _chunks(self, factors: Tensor, latents: Tensor) -> Iterator[Tensor]:
        """(chunk, n) scores of some latents, of consecutive rows."""
        return (self._block(part, latents) for part in factors.split(_room(factors, latents.numel())))

    def scores(self, prepared: Prepared, support: Support, *, step: Step = DEFAULT) -> Tensor:
        if prepared.factors is None and support.scores is not None:
            return support.scores.to(self.W_dec.dtype, copy=True)
        factors = self._factors(prepared)
        start = rows_of(support.offsets, support.indices.numel()) * factors.shape[1]
        p, q = self._places(support.indices)
        flat = factors.reshape(-1)
        return _Root.apply(flat[start + p] * flat[start + q]).to(self.W_dec.dtype)


def _room(factors: Tensor, scores: int) -> int:
    """How many times so many scores fit, with their two factors."""
    return max(1, SCORE_BYTES // max(1, 3 * scores * factors.element_size()))


class _Root(torch.autograd.Function):
    """Square root whose gradient stays finite at 0."""

    @staticmethod
    def forward(ctx, product):
        root = product.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (root,) = ctx.saved_tensors
        return 0.5 * grad / root.clamp(min=SMALLEST)
