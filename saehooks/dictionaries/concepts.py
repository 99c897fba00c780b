"""The dictionary of the Sparsemax SAE: one table of concepts is both keys and values of a cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from saehooks import kernels
from saehooks.dictionaries.base import Dictionary, Directions, Prepared, unit_rows
from saehooks.errors import ConfigError
from saehooks.kernels import DEFAULT, Step, Support
from saehooks.kernels.step import KeptProduct

LOOKS = 384
"""Rows of a table that are looked at in about the time that a row takes for two products with a (d_in, d_in) matrix."""
MARGIN = 1.25
"""How much cheaper directions must be than the products they spare."""


class ConceptDictionary(Dictionary):
    """``scores = (q @ W_k.T) @ C.T`` with q the direction of x; ``recons = |x| * (values @ C) @ W_v``.

    With ``center`` (the default) x is taken relative to a learned b_dec, started at the mean of the data: where much
    of the energy of an activation is its mean, latents die without it. The keys C W_k are never made, the values C W_v
    only where values are refined.

    Args:
        center: learn b_dec and subtract it before the direction and norm are taken.
        key_scale: W_k starts at this multiple of the identity. Larger keys, smaller supports.
        value_scale: W_v starts at this multiple of the identity: 1 / key_scale where codes carry enlarged scores.
        eps: added to the norm that divides x. The authors' code has none.
    Source: Sparsemax SAE, CVPR 2026.
    """

    name: ClassVar[str] = "concepts"
    by_latent: ClassVar[Mapping[str, int]] = MappingProxyType({"C": 0})

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        center: bool = True,
        key_scale: float = 1.0,
        value_scale: float = 1.0,
        eps: float = 1e-6,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(d_in, d_sae)
        if key_scale <= 0 or eps < 0:
            raise ConfigError(f"key_scale must be positive and eps not negative, got key_scale={key_scale}, eps={eps}")
        self.eps = eps
        self._kept_directions = KeptProduct()
        self.C = nn.Parameter(unit_rows(d_sae, d_in, dtype))
        self.W_k = nn.Parameter(torch.eye(d_in, dtype=dtype) * key_scale)
        self.W_v = nn.Parameter(torch.eye(d_in, dtype=dtype) * value_scale)
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=dtype)) if center else None

    def prepare(self, x: Tensor) -> Prepared:
        given = x, self.b_dec, self.W_k, self.eps
        if kernels.is_differentiated(x, self.b_dec, self.W_k):
            return Prepared(*_Directions.apply(*given))
        _, norm, queries = _directions(*given)
        return Prepared(queries, norm)

    @property
    def keys(self) -> Tensor:
        return self.C

    @property
    def table(self) -> Tensor:
        return self.C

    def scored_sums(
        self, prepared: Prepared, support: Support, *, step: Step = DEFAULT
    ) -> tuple[Tensor, Tensor | None]:
        queries = self.shared(prepared.queries)
        scores, sums = kernels.sddmm_spmm(queries, self.C, support, known=support.scores, step=step)
        return scores, self.whole(sums)

    def for_refinement(self, rows: int, steps: int) -> Dictionary:
        """The directions ``C W_v``, on CPU, where making them costs less than the products they spare.

        Those are two products of rows with a (d_in, d_in) matrix in each step, and as many again for each in a backward
        pass. In use the directions are kept from call to call; few rows are faster without: whether the tables are
        still the same takes a look at each of their rows.
        """
        if self.C.device.type != "cpu" or self.C.dtype.itemsize < 4:
            return self
        changing = self.training or self.C.is_inference() or self.W_v.is_inference()  # those do not say if they change
        if not (changing or kernels.is_differentiated(self.C, self.W_v)):
            few = rows * LOOKS < self.d_sae
            return self if few else Directions(self._kept_directions.of(torch.mm, self.C, self.W_v))
        return Directions(self.C @ self.W_v) if 2 * steps * rows > MARGIN * self.d_sae else self

    def project(self, sums: Tensor) -> Tensor:
        return sums @ self.W_v

    def project_adjoint(self, errors: Tensor) -> Tensor:
        return errors @ self.W_v.T

    def direction_norms(self) -> Tensor:
        return (self.C @ self.shared(self.W_v)).norm(dim=1)

    @property
    def offset(self) -> Tensor | None:
        return self.b_dec

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        if self.b_dec is not None:
            self.b_dec.copy_(x.mean(0))
        for row, direction in self.rows_from_data(x if self.b_dec is None else x - self.b_dec):
            self.C[row] = direction


def _directions(x: Tensor, b_dec: Tensor | None, W_k: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, d_in) directions u of ``x - b_dec``, the norms (rows,), and the queries (rows, d_in) ``u @ W_k.T``."""
    directions, norm = kernels.for_rows(x, b_dec).directions(x, b_dec, eps)
    return directions, norm, nn.functional.linear(directions, W_k)


class _Directions(torch.autograd.Function):
    """``q = u @ W_k.T`` with u the direction of ``x - b_dec``, and its norm.

    Written out because the gradient of b_dec alone, all that training on given activations needs, takes no product of
    matrices: with c the centred rows and n their norms, dc = du / (n + eps) + (dn - u.du / (n + eps)) c / n, where
    du = dq W_k and u.du = q.dq.
    """

    @staticmethod
    def forward(ctx, x, b_dec, W_k, eps):
        directions, norm, queries = _directions(x, b_dec, W_k, eps)
        ctx.save_for_backward(directions, norm, queries, W_k)
        ctx.eps = eps
        return queries, norm

    @staticmethod
    @once_differentiable
    def backward(ctx, d_queries, d_norm):
        directions, norm, queries, W_k = ctx.saved_tensors
        shifted = norm + ctx.eps
        along = kernels.for_rows(queries, d_queries).row_products(queries, d_queries) / shifted
        # c / n = u (n + eps) / n, which a row of zeros does not have.
        along = torch.where(norm > 0, (d_norm - along) * shifted / norm, 0.0)
        d_x = d_b = d_W = None
        if ctx.needs_input_grad[0]:
            d_x = torch.addcmul((d_queries / shifted[:, None]) @ W_k, directions, along[:, None])
            d_b = -d_x.sum(0) if ctx.needs_input_grad[1] else None
        elif ctx.needs_input_grad[1]:
            d_b = -(W_k.T.mv(d_queries.T.mv(1 / shifted)) + directions.T.mv(along))
        if ctx.needs_input_grad[2]:
            d_W = d_queries.T @ directions
        return d_x, d_b, d_W, None
