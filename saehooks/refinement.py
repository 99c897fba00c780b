"""Refinement: steps of the reconstruction's gradient on the values of a support that was already chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from saehooks.activations import Activation
from saehooks.dictionaries import Dictionary, Prepared
from saehooks.errors import ConfigError
from saehooks.kernels import DEFAULT, Step, Support, for_rows, is_differentiated
from saehooks.precision import widened

METHODS = ("gradient", "bounded", "conjugate")
MOST = 1.9
"""The largest bounded step, in units of the one that lowers a row's error most; twice that one leaves it as it was."""


class Refined(NamedTuple):
    """What refinement gives."""

    support: Support
    """The latents that are left."""
    values: Tensor
    """(nnz,) their refined values, differentiable in everything."""
    kept: Tensor | None = None
    """(nnz before,) bool, which latents were left; None for all."""
    unscaled: Tensor | None = None
    """(rows, d_out) ``values @ directions``, where refining has made it."""
    first_unscaled: Tensor | None = None
    """(rows, d_out) that of the values it was given."""


class Refinement(nn.Module):
    """``a <- a + rate * (target - a W) W^T`` on the selected latents alone, ``refine`` times.

    One pass of an encoder cannot infer sparse codes exactly; after the support is chosen, each step closes part of
    that gap for one sparse decode and one sampled product, without another dense product. Decoding stays linear in the
    codes. With ``refine=0`` there is neither a parameter nor any arithmetic.

    With ``reselect`` the activation chooses twice: widely by the scores of the first pass, then, after the first step,
    among those latents by their refined scores, which know what the others already explain; steps that follow refine
    the values of what is left. Sparsemax chooses by ``sparsemax(reselect * scores)``, so 1 or a little more, beside a
    ``key_scale`` below 1 that widens the first choice; top-k keeps the ``reselect`` largest of its k.

    With ``refine_method="bounded"`` a row in which a step of that size would enlarge the error takes the largest one
    that does not. So no row runs away, in use or in training, whatever the rates have become: learned rates meet rows
    that they are too large for, and one such batch can end a training.

    With ``refine_method="conjugate"`` the steps are those of conjugate gradients: each row finds its own step sizes and
    directions, so there is nothing to learn, no row's error ever grows, and three steps come close to least squares on
    the support. It is what `saehooks.SAE.refined` adds to an SAE that was trained without refinement.

    Args:
        refine: number of steps.
        refine_rate: step size at the start, in units where directions of norm 1 call for at most 1.
        learn_refine_rate: train the step sizes, one for each step; otherwise they stay.
        reselect: choose again after the first step; None for the first choice alone.
        refine_method: ``"gradient"``, ``"bounded"``, or ``"conjugate"``, which has no rates and does not choose again.
    Raises:
        ConfigError: not a whole number of steps, a rate that is not positive, reselect without a step, an unknown
            method, or one that does not go with the others.
    Source: Gregor & LeCun 2010 (learned ISTA), with the support held fixed; the gap: arXiv:2411.13117. Conjugate
        gradients on the normal equations: Hestenes & Stiefel 1952 (CGLS).
    """

    def __init__(
        self,
        *,
        refine: int = 0,
        refine_rate: float = 0.5,
        learn_refine_rate: bool = True,
        reselect: float | None = None,
        refine_method: str = "gradient",
    ) -> None:
        super().__init__()
        if isinstance(refine, bool) or not isinstance(refine, int) or refine < 0:
            raise ConfigError(f"refine={refine!r}: write the number of refinement steps, 0 for none")
        if not refine_rate > 0:
            raise ConfigError(f"refine_rate must be positive, got {refine_rate!r}")
        if reselect is not None and not refine:
            raise ConfigError(f"reselect={reselect!r} chooses by refined scores: write refine=1 or more with it")
        if refine_method not in METHODS:
            raise ConfigError(f"refine_method={refine_method!r}: choose one of {', '.join(METHODS)}")
        if refine_method == "conjugate" and (reselect is not None or refine_rate != 0.5 or not learn_refine_rate):
            raise ConfigError('refine_method="conjugate" finds its own step sizes and does not choose again: leave out '
                              "refine_rate=, learn_refine_rate= and reselect=")  # fmt: skip
        if refine_method != "gradient" and not refine:
            raise ConfigError(f"refine_method={refine_method!r} refines: write refine=1 or more with it")
        self.steps, self.reselect, self.method = refine, reselect, refine_method
        if refine and refine_method != "conjugate":
            self.rates = nn.Parameter(torch.full((refine,), float(refine_rate)), requires_grad=learn_refine_rate)

    @property
    def takes_padding(self) -> bool:
        """Whether codes may have entries that belong to no row."""
        return self.reselect is None and self.method != "conjugate"

    def forward(
        self,
        dictionary: Dictionary,
        activation: Activation,
        x: Tensor,
        prepared: Prepared,
        support: Support,
        values: Tensor,
        active: Tensor | None = None,
        *,
        sums: Tensor | None = None,
        decoding: bool = False,
        step: Step = DEFAULT,
    ) -> Refined:
        """Refine, and choose again where `reselect` says so.

        Args:
            dictionary: decodes.
            activation: chooses.
            x: (rows, d_in) activations.
            prepared: the same rows, as the dictionary prepared them.
            support: the selected latents.
            values: (nnz,) their values.
            active: (nnz,) bool, the latents whose values may move; None for all.
            sums: (rows, d) what the values weigh out of the table, where it is at hand.
            decoding: whether what comes out is decoded next.
            step: what the kernels know beside these.
        """
        if not self.steps:
            return Refined(support, values, unscaled=None if sums is None else dictionary.project(sums))
        target, unscaled = dictionary.target(x, prepared), None if sums is None else dictionary.project(sums)
        directions = dictionary.for_refinement(x.shape[0], self.steps)
        given = directions, target, support, values, unscaled, active
        if self.method == "conjugate":
            return self._conjugate(*given, step)
        if self.method == "bounded":
            return self._bounded(*given, activation, step)
        return self._gradient(*given, activation, decoding, step)

    def _gradient(
        self,
        dictionary: Dictionary,
        target: Tensor,
        support: Support,
        values: Tensor,
        unscaled: Tensor | None,
        active: Tensor | None,
        activation: Activation,
        decoding: bool,
        step: Step,
    ) -> Refined:
        """The steps, each as large as its rate says."""
        kept = first = None
        tracked = is_differentiated(values, target, self.rates, dictionary.table, dictionary)
        for i, rate in enumerate(self.rates):
            again = self.reselect if i == 0 else None
            if active is None and again is None and not (decoding or tracked):
                moved = dictionary.refined(target, values, rate, support, step=step)
                if moved is not None:
                    values, unscaled = moved, None
                    continue
            if unscaled is None:
                unscaled = dictionary.project(dictionary.weighted_sums(values, support, step=step))
            first = unscaled if i == 0 else first
            missed = target - unscaled
            if active is None and again is None and (decoding or i + 1 < self.steps):
                values, sums = dictionary.moved_sums(missed, support, values=values, rate=rate, step=step)
                unscaled = dictionary.project(sums)
                continue
            change = dictionary.alignments(missed, support, step=step)
            change = change if active is None else change.masked_fill(~active, 0.0)
            values, unscaled = values + dictionary.shared(rate) * change, None
            if again is not None:
                kept, support, values, active = _chosen_again(activation, again, support, values, active)
        return Refined(support, values, kept, unscaled, first)

    def _bounded(
        self,
        dictionary: Dictionary,
        target: Tensor,
        support: Support,
        values: Tensor,
        unscaled: Tensor | None,
        active: Tensor | None,
        activation: Activation,
        step: Step,
    ) -> Refined:
        """The steps, each row's no larger than what still lowers its error.

        What a step adds to the reconstruction says how far it may go, and gives the next reconstruction as well.
        """
        kept = first = None
        for i, rate in enumerate(self.rates):
            if unscaled is None:
                unscaled = dictionary.project(dictionary.weighted_sums(values, support, step=step))
            first = unscaled if i == 0 else first
            missed = target - unscaled
            if active is None:
                slope, change = dictionary.moved_sums(missed, support, step=step)
            else:
                slope = dictionary.alignments(missed, support, step=step).masked_fill(~active, 0.0)
                change = dictionary.weighted_sums(slope, support, step=step)
            change = dictionary.project(change)
            rates = row_rates(rate, change, missed)
            by_row = torch.cat([dictionary.shared(rates), rates.new_zeros(1)])  # padding belongs to no row
            values, unscaled = values + by_row[support.rows] * slope, unscaled + rates[:, None] * change
            if i == 0 and self.reselect is not None:
                kept, support, values, active = _chosen_again(activation, self.reselect, support, values, active)
                unscaled = None
        return Refined(support, values, kept, unscaled, first)

    def _conjugate(
        self,
        dictionary: Dictionary,
        target: Tensor,
        support: Support,
        values: Tensor,
        unscaled: Tensor | None,
        active: Tensor | None,
        step: Step,
    ) -> Refined:
        """The steps of conjugate gradients. Sums of squares are made in the widest type: narrow ones would overflow."""
        if unscaled is None:
            unscaled = dictionary.project(dictionary.weighted_sums(values, support, step=step))
        rows, missed = support.rows, target - unscaled

        def slopes() -> tuple[Tensor, Tensor]:
            found = dictionary.alignments(missed, support, step=step)
            found = found if active is None else found.masked_fill(~active, 0.0)
            squares = widened(found).square()
            own = squares.new_zeros(support.n_rows).index_add(0, rows, squares)
            return found, dictionary.whole(own[:, None])[:, 0]

        slope, size = slopes()
        along = slope
        for left in range(self.steps - 1, -1, -1):
            change = dictionary.project(dictionary.weighted_sums(along, support, step=step))
            far = _ratio(size, widened(change).square().sum(1)).to(values.dtype)
            values, missed = values + dictionary.shared(far)[rows] * along, missed - far[:, None] * change
            if left:
                slope, now = slopes()
                along = slope + dictionary.shared(_ratio(now, size).to(values.dtype))[rows] * along
                size = now
        return Refined(support, values, None, target - missed, unscaled)

    def extra_repr(self) -> str:
        more = "" if self.reselect is None else f", reselect={self.reselect}"
        return f"refine={self.steps}{more}" + ("" if self.method == "gradient" else f", refine_method={self.method!r}")


def _chosen_again(
    activation: Activation, amount: float, support: Support, values: Tensor, active: Tensor | None
) -> tuple[Tensor, Support, Tensor, Tensor | None]:
    """(nnz,) bool, the latents that an activation keeps by refined values (nnz,); and what is left of the others."""
    kept = activation.reselect(values.detach(), support, amount)
    return kept, support.keep(kept), values[kept], None if active is None else active[kept]


def row_rates(rate: Tensor, change: Tensor, missed: Tensor) -> Tensor:
    """(rows,) the size of a step in each row: ``rate``, or the largest that still lowers the row's error.

    Args:
        rate: ().
        change: (rows, d) what a step of size 1 adds to the reconstruction.
        missed: (rows, d) what the reconstruction lacks; a step goes down its square.
    """
    with torch.no_grad():
        change, missed = (one.float() if one.dtype.itemsize < 4 else one for one in (change, missed))
        products = for_rows(change, missed).row_products
        square, along = products(change, change), products(change, missed)
        most = torch.where(square > 0, MOST * along.clamp(min=0) / square, torch.inf)
    return torch.minimum(rate.to(most.dtype), most).to(rate.dtype)


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    """``one / other`` of numbers (rows,) that are not negative, and 0 where there is nothing to divide by."""
    there = other > 0
    return torch.where(there, one / torch.where(there, other, 1.0), 0.0)
