"""Refinement: gradient steps of the reconstruction on the values of a support that was already chosen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saehooks import kernels
from saehooks.dictionaries import Dictionary, Prepared
from saehooks.errors import ConfigError
from saehooks.kernels import DEFAULT, Step, Support


class Refinement(nn.Module):
    """``a <- a + rate * (target - a W) W^T`` on the selected latents alone, ``refine`` times.

    One pass of an encoder cannot infer sparse codes exactly; after the support is chosen, each step closes part of
    that gap for one sparse decode and one sampled product, without another dense product. Decoding stays linear in the
    codes. With ``refine=0`` there is neither a parameter nor any arithmetic.

    Args:
        refine: number of steps.
        refine_rate: step size at the start, in units where directions of norm 1 call for at most 1.
        learn_refine_rate: train the step sizes, one for each step; otherwise they stay.
    Raises:
        ConfigError: not a whole number of steps, or a rate that is not positive.
    Source: Gregor & LeCun 2010 (learned ISTA), with the support held fixed; the gap: arXiv:2411.13117.
    """

    def __init__(self, *, refine: int = 0, refine_rate: float = 0.5, learn_refine_rate: bool = True) -> None:
        super().__init__()
        if isinstance(refine, bool) or not isinstance(refine, int) or refine < 0:
            raise ConfigError(f"refine={refine!r}: write the number of refinement steps, 0 for none")
        if not refine_rate > 0:
            raise ConfigError(f"refine_rate must be positive, got {refine_rate!r}")
        self.steps = refine
        if refine:
            self.rates = nn.Parameter(torch.full((refine,), float(refine_rate)), requires_grad=learn_refine_rate)

    def forward(
        self,
        dictionary: Dictionary,
        x: Tensor,
        prepared: Prepared,
        support: Support,
        values: Tensor,
        active: Tensor | None = None,
        *,
        step: Step = DEFAULT,
    ) -> Tensor:
        """Refined values (nnz,), differentiable in everything.

        Args:
            dictionary: decodes.
            x: (rows, d_in) activations.
            prepared: the same rows, as the dictionary prepared them.
            support: the selected latents.
            values: (nnz,) their values.
            active: (nnz,) bool, the latents whose values may move; None for all.
            step: what the kernels know beside these.
        """
        if not self.steps:
            return values
        table = dictionary.table
        target = dictionary.target(x, prepared)
        for rate in self.rates:
            missed = target - dictionary.project(kernels.spmm(values, support, table, step=step))
            change = kernels.sddmm(dictionary.project_adjoint(missed), table, support, step=step)
            change = change if active is None else change.masked_fill(~active, 0.0)
            values = values + rate * change
        return values

    def extra_repr(self) -> str:
        return f"refine={self.steps}"
