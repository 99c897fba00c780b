"""What a dictionary is: how scores come from an activation, and how codes become a reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from saehooks import kernels
from saehooks.codes import Codes
from saehooks.kernels import DEFAULT, BatchRule, RowRule, Step, Support
from saehooks.kernels.step import ScreenTables
from saehooks.support import offsets_of

HUGE = 8.0
"""Norm of a massive activation, in medians of all."""
MASSIVE = 8
"""Directions of massive activations that are looked for."""
SAME_DIRECTION = 0.9
"""Cosine from which two of them are one."""


class Prepared(NamedTuple):
    """An activation ready to be scored."""

    queries: Tensor
    """(rows, d), what is multiplied with the keys."""
    scale: Tensor | None
    """(rows,) multiplier of the reconstruction, or None for 1."""
    shift: Tensor | None = None
    """(rows, 1) or (rows, d_out) added to the reconstruction at last, or None: what no latent carries."""
    factors: Tensor | None = None
    """(rows, n) products of the queries that every latent's score is made of, where the dictionary made them once."""


class Dictionary(nn.Module):
    """Scores are ``queries @ keys.T + bias``; a reconstruction is ``scale * (values @ directions) + offset``.

    Subclasses say what the queries, keys and directions are. `select`, `scores` and `score_chunks` are overridden
    where scores are no plain product.
    """

    name: ClassVar[str]
    d_in: int
    d_out: int
    d_sae: int
    scales_offset: bool = False
    """Whether `offset` is in the units of the queries, so that a row's scale multiplies it too."""
    by_latent: ClassVar[Mapping[str, int]] = MappingProxyType({})
    """Names of the tensors that hold something for each latent, with the axis along which latents lie."""

    def __init__(self, d_in: int, d_sae: int, d_out: int | None = None) -> None:
        super().__init__()
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_in if d_out is None else d_out
        self._screen_tables = ScreenTables()

    # ---- the parts a subclass defines

    def prepare(self, x: Tensor) -> Prepared:
        """Queries and scale of activations (rows, d_in), differentiable."""
        raise TypeError(f"{type(self).__name__} must override prepare()")

    @property
    def keys(self) -> Tensor:
        """(d_sae, d), one key a latent."""
        raise TypeError(f"{type(self).__name__} must override keys")

    @property
    def bias(self) -> Tensor | None:
        """(d_sae,) added to the scores, or None."""
        return None

    @property
    def table(self) -> Tensor:
        """(d_sae, d), the rows that codes weigh before `project`."""
        raise TypeError(f"{type(self).__name__} must override table")

    def project(self, sums: Tensor) -> Tensor:
        """(rows, d_out) from weighted sums of table rows (rows, d)."""
        return sums

    def project_adjoint(self, errors: Tensor) -> Tensor:
        """(rows, d) from errors (rows, d_in): the transpose of `project`, for gradients with respect to values."""
        return errors

    @property
    def offset(self) -> Tensor | None:
        """(d_out,) added to every reconstruction, or None."""
        return None

    def target(self, x: Tensor, prepared: Prepared) -> Tensor:
        """(rows, d_in) what ``values @ directions`` should equal: x (rows, d_in) less the offset, in units of scale."""
        target = x if self.offset is None else x - self.offset
        if prepared.scale is None:
            return target
        return target / prepared.scale.clamp(min=torch.finfo(target.dtype).tiny)[:, None]

    def initialise(self, x: Tensor) -> None:
        """Set what is best set from data, before training, from a sample (rows, d_in)."""

    first_latent = 0
    """The number of the first latent of this table, where it is part of a larger one."""

    def rows_from_data(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Rows of the table that are best set from data: (row, direction (d_in,) of norm 1), of those it holds.

        Args:
            x: (rows, d_in) about the offset.
        """
        for i, direction in enumerate(massive_directions(x)):
            if 0 <= i - self.first_latent < self.d_sae:
                yield i - self.first_latent, direction

    @property
    def adjusts_gradients(self) -> bool:
        """Whether `after_backward` changes gradients: a trainer must then have them written before it calls it."""
        return False

    def after_backward(self) -> None:
        """Adjust gradients between the backward pass and the optimiser's step, if `adjusts_gradients`."""

    def after_step(self) -> None:
        """Restore constraints after the optimiser's step."""

    # ---- what follows from them

    def select(
        self,
        prepared: Prepared,
        rule: RowRule | BatchRule,
        *,
        among: Tensor | None = None,
        silenced: Tensor | None = None,
        step: Step = DEFAULT,
    ) -> Support:
        """Which latents each row selects, without gradient and without keeping the score matrix.

        Args:
            prepared: the rows.
            rule: how.
            among: (n,) int64 ascending, the only latents to choose from; None for all.
            silenced: (d_sae,) bool, latents whose score is taken to be 0; None for none.
            step: what the kernels know beside these.
        """
        keys, bias = self.keys, self.bias
        if silenced is not None:
            keys = keys.masked_fill(silenced[:, None], 0.0)
            bias = None if bias is None else bias.masked_fill(silenced, 0.0)
        if among is None:
            # While training the keys change in each step: a copy of them would not be used again.
            kept = None if self.training or silenced is not None else self._screen_tables
            support = kernels.select(prepared.queries, keys, rule, bias, step=replace(step, screen_tables=kept))
        else:
            few = None if bias is None else bias[among]
            support = kernels.select(prepared.queries, keys[among], rule, few, step=step)
            support = support.renamed(among, self.d_sae)
        return support if silenced is None else support.with_scores(None)

    def select_ranked(
        self, prepared: Prepared, k: int, rank: Callable[[Tensor], Tensor], silenced: Tensor | None = None
    ) -> Support:
        """The k latents of each row whose scores rank highest, whatever their sign.

        Args:
            prepared: the rows.
            k: latents of each row.
            rank: what of the dense scores (chunk, d_sae) is compared, such as their magnitude.
            silenced: (d_sae,) bool, latents whose score is taken to be 0; None for none.
        """
        parts = []
        for scores in self.score_chunks(prepared):
            scores = scores if silenced is None else scores.masked_fill(silenced, 0.0)
            parts.append(rank(scores).topk(k, dim=1).indices.sort(dim=1).values)
        chosen = torch.cat(parts) if parts else prepared.queries.new_zeros(0, k, dtype=torch.int64)
        sizes = torch.full((len(chosen),), k, dtype=torch.int64, device=chosen.device)
        threshold = prepared.queries.new_zeros(len(chosen))
        return Support(chosen.reshape(-1), offsets_of(sizes), threshold).trusted(self.d_sae)

    def score_chunks(self, prepared: Prepared) -> Iterator[Tensor]:
        """Dense scores (chunk, d_sae) of consecutive rows, without gradient; the next chunk overwrites the last."""
        return kernels.score_chunks(prepared.queries, self.keys, self.bias)

    def scores(self, prepared: Prepared, support: Support, *, step: Step = DEFAULT) -> Tensor:
        """(nnz,) scores of the selected latents, differentiable."""
        queries, known = prepared.queries, support.scores
        if known is not None and not kernels.is_differentiated(queries, self):
            return known.clone() if known.dtype == queries.dtype else known.to(queries.dtype)
        queries = self.shared(queries)
        return kernels.sddmm(queries, self.keys, support, bias=self.bias, known=known, step=step)

    def scored_sums(
        self, prepared: Prepared, support: Support, *, step: Step = DEFAULT
    ) -> tuple[Tensor, Tensor | None]:
        """`scores`, and the `weighted_sums` of them where both together cost less than one after the other."""
        return self.scores(prepared, support, step=step), None

    def alignments(self, errors: Tensor, support: Support, *, step: Step = DEFAULT) -> Tensor:
        """(nnz,) products of each latent's direction with its row's error, errors (rows, d_out)."""
        return kernels.sddmm(self.shared(self.project_adjoint(errors)), self.table, support, step=step)

    def for_refinement(self, rows: int, steps: int) -> Dictionary:
        """What refines values of so many rows in so many steps: this dictionary, or one of the same directions that is
        faster at it. It has no queries, no offset and no parameters of its own."""
        return self

    def refined(
        self, target: Tensor, values: Tensor, rate: Tensor, support: Support, *, step: Step = DEFAULT
    ) -> Tensor | None:
        """(nnz,) what `moved_sums` makes of values (nnz,) and their errors, without gradient, in one pass; target
        (rows, d_out), rate (). None where the table holds no directions, or only some of them."""
        return None

    def moved_sums(
        self,
        errors: Tensor,
        support: Support,
        *,
        values: Tensor | None = None,
        rate: Tensor | None = None,
        step: Step = DEFAULT,
    ) -> tuple[Tensor, Tensor]:
        """(nnz,) ``values + rate * alignments(errors)``, and the `weighted_sums` of these, which share their pass.

        Args:
            errors: (rows, d_out).
            support: of the rows.
            values: (nnz,), None for 0.
            rate: (), None for 1.
            step: what the kernels know beside these.
        """
        left, rate = self.shared(self.project_adjoint(errors)), None if rate is None else self.shared(rate)
        moved, sums = kernels.sddmm_spmm(left, self.table, support, values=values, rate=rate, step=step)
        return moved, self.whole(sums)

    def decode(
        self, codes: Codes, with_offset: bool = True, *, unscaled: Tensor | None = None, step: Step = DEFAULT
    ) -> Tensor:
        """(rows, d_out) reconstruction of codes, flattened; without the offset it is linear in the values.

        Args:
            codes: what is decoded.
            with_offset: add what no latent carries.
            unscaled: (rows, d_out) ``values @ directions``, where it is at hand already.
            step: what the kernels know beside these.
        """
        recons = self.project(self.sums(codes, step=step)) if unscaled is None else unscaled
        offset = self.offset if with_offset else None
        if offset is not None and self.scales_offset:
            recons = recons + offset
        after = None if self.scales_offset else offset
        if codes.scale is not None:
            recons = _Scaled.apply(recons, codes.scale, after)
        elif after is not None:
            recons = recons + after
        return recons + codes.shift if with_offset and codes.shift is not None else recons

    def total(self, latents: int) -> int:
        """A sum over latents; where processes share a dictionary, each gives the sum over its own latents."""
        return latents

    def shared(self, tensor: Tensor) -> Tensor:
        """A tensor that all latents read: processes that share a dictionary add up what their latents say of it."""
        return tensor

    def whole(self, sums: Tensor) -> Tensor:
        """Sums over latents (rows, d); processes that share a dictionary add up those over their own latents."""
        return sums

    def sums(self, codes: Codes, *, step: Step = DEFAULT) -> Tensor:
        """(rows, d) sums of the table's rows, weighed by codes."""
        return self.weighted_sums(codes.values, codes.support or Support(codes.indices, codes.offsets), step=step)

    def weighted_sums(self, values: Tensor, support: Support, *, step: Step = DEFAULT) -> Tensor:
        """(rows, d) sums of the table's rows, weighed by values (nnz,)."""
        return self.whole(kernels.spmm(values, support, self.table, step=step))

    def forward(self, codes: Codes) -> Tensor:
        """Decode to (rows, d_out), as a module call, so that `torch.func.functional_call` can swap the parameters."""
        return self.decode(codes)

    def directions(self, latents: Tensor) -> Tensor:
        """(n, d_out) what one unit of each latent adds to a reconstruction of scale 1."""
        return self.project(self.table[latents])

    def direction_norms(self) -> Tensor:
        """(d_sae,) norm of every latent's direction, differentiable."""
        return self.project(self.table).norm(dim=1)


class DirectionTable(Dictionary):
    """A dictionary whose table holds the directions themselves."""

    def refined(
        self, target: Tensor, values: Tensor, rate: Tensor, support: Support, *, step: Step = DEFAULT
    ) -> Tensor | None:
        return kernels.refine(target, self.table, support, values, rate, step=step)


class Directions(DirectionTable):
    """The directions of all latents (d_sae, d_out) of another dictionary, whose values it refines."""

    name: ClassVar[str] = "directions"

    def __init__(self, directions: Tensor) -> None:
        super().__init__(directions.shape[1], directions.shape[0])
        self._directions = directions

    @property
    def table(self) -> Tensor:
        return self._directions


class RowDecoder(DirectionTable):
    """A dictionary whose reconstruction is ``values @ W_dec + b_dec``, with b_dec started at the mean of the data."""

    W_dec: nn.Parameter
    """(d_sae, d_in)."""
    b_dec: nn.Parameter
    """(d_in,)."""

    @property
    def table(self) -> Tensor:
        return self.W_dec

    @property
    def offset(self) -> Tensor:
        return self.b_dec

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        self.b_dec.copy_(x.mean(0))


def massive_directions(x: Tensor) -> Tensor:
    """(n, d_in) directions of the rows of huge norm, n at most `MASSIVE`; none in most data.

    A few tokens of a language model share one direction and have norms 20 to 100 times those of the others. By token
    they weigh next to nothing, so that a loss by token learns them last; in a ratio of sums they are a third of it.
    Source: massive activations, arXiv:2402.17762.

    Args:
        x: (rows, d_in) about the offset.
    """
    norms = x.norm(dim=1)
    huge = norms > HUGE * norms.median() if len(x) else norms > 0
    left = x[huge & norms.isfinite()]
    left = left[left.norm(dim=1).argsort(descending=True)]
    left = left / left.norm(dim=1, keepdim=True)
    found: list[Tensor] = []
    while len(left) and len(found) < MASSIVE:
        found.append(left[0])
        left = left[left @ left[0] < SAME_DIRECTION]
    return torch.stack(found) if found else x[:0]


class _Scaled(torch.autograd.Function):
    """``recons * scale + offset`` of recons (rows, d), scale (rows,) and offset (d,) or None.

    Written out because each pass over the rows costs as much as a tenth of a small dictionary's product.
    """

    @staticmethod
    def forward(ctx, recons, scale, offset):
        ctx.save_for_backward(recons, scale)
        if offset is None:
            return recons * scale[:, None]
        return torch.addcmul(offset, recons, scale[:, None])

    @staticmethod
    def backward(ctx, grad):
        recons, scale = ctx.saved_tensors
        d_recons = d_scale = None
        if ctx.needs_input_grad[0] and ctx.needs_input_grad[1]:
            d_recons, d_scale = kernels.for_rows(grad, recons, scale).scaled_gradient(grad, recons, scale)
        elif ctx.needs_input_grad[0]:
            d_recons = grad * scale[:, None]
        elif ctx.needs_input_grad[1]:
            d_scale = kernels.for_rows(grad, recons).row_products(grad, recons)
        return d_recons, d_scale, grad.sum(0) if ctx.needs_input_grad[2] else None


def unit_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """(rows, width) random directions of norm 1."""
    made = torch.randn(rows, width, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    return torch.nn.functional.normalize(made, dim=1).to(dtype)
