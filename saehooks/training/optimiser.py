"""Adam for SAEs: on a GPU the gradient of a table goes from its sparse sums into the update, and never to memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saehooks.errors import ConfigError
from saehooks.kernels import Capacity, SparseGradients, Step, backend_for
from saehooks.kernels.reference.adam import AdamNumbers
from saehooks.kernels.step import Bfloat16Tables, Contribution
from saehooks.sae import SAE


def _adam_step(optimizer: torch.optim.Adam) -> None:
    """Adam's own step, without the step hooks: torch runs those of a subclass around the subclass's step already."""
    step = torch.optim.Adam.step
    if getattr(step, "hooked", False):  # once a plain Adam has been made
        step = step.__wrapped__  # type: ignore[attr-defined]
    step(optimizer)


class TableAdam(torch.optim.Adam):
    """``torch.optim.Adam(fused=True)`` that can leave the gradients of an SAE's tables unwritten.

    Backward passes of a forward given `kernel_step` keep the tables' gradients as sparse sums; `step` reads them. What
    the update computes is Adam, with both running means in float32; a checkpoint of one loads into the other. A table
    that also got a gradient in the usual way, or from more than two sums, is updated from the written gradient; so are
    half-precision tables, by torch, which keeps their running means in half precision too.
    Anything that changes gradients between backward and step (clipping, the unit-norm decoder) needs them written:
    leave `kernel_step` out, or call `write_gradients`.

    Args:
        sae: whose parameters are trained.
        **settings: of ``torch.optim.Adam``: lr, betas, eps, weight_decay.
    Raises:
        ConfigError: amsgrad or maximize, which the fused update does not know.

    >>> sae = SAE(d_in=8, d_sae=32)
    >>> optimizer = TableAdam(sae, lr=1e-3)
    >>> x = torch.randn(16, 8)
    >>> (sae(x, step=optimizer.kernel_step()).recons - x).square().sum().backward()
    >>> optimizer.step()
    """

    def __init__(self, sae: SAE, **settings: Any) -> None:
        unknown = sorted(set(settings) - {"lr", "betas", "eps", "weight_decay"})
        if unknown:
            raise ConfigError(f"TableAdam takes lr, betas, eps and weight_decay, got also {', '.join(unknown)}")
        self._sae = sae
        self._kept: SparseGradients | None = None
        super().__init__(sae.parameters(), fused=True, capturable=sae.device.type == "cuda", **settings)

    @property
    def tables(self) -> list[torch.nn.Parameter]:
        """The parameters whose gradients can be left unwritten: one row of memory a latent."""
        wanted = (self._sae.d_sae, self._sae.d_in)
        return [p for p in self._sae.parameters() if p.requires_grad and tuple(_rows_of_latents(p).shape) == wanted]

    def kernel_step(self, capacity: Capacity | None = None) -> Step:
        """What a forward is given, so that its backward leaves the tables' gradients unwritten where a kernel can.

        Under ``torch.set_float32_matmul_precision("medium")`` forward and backward read one bfloat16 copy of each table
        on a GPU: do not change parameters between them.

        Args:
            capacity: room for the codes; None for exact sizes.
        """
        if self._kept is None:
            self._kept = SparseGradients(_rows_of_latents(p) for p in self.tables if _fused(p))
        return Step(capacity=capacity, sparse_gradients=self._kept, bfloat16_tables=Bfloat16Tables())

    def write_gradients(self) -> None:
        """Write what was kept as sparse sums into ``.grad``, as a plain backward pass does."""
        for p in self.tables:
            self._write(p, self._taken(p))

    def step(self, closure: Any = None) -> Any:
        """Update all parameters; a step whose ``found_inf`` is set changes nothing."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                self._step_table(p, group)
        self._kept = None
        _adam_step(self)
        for group in self.param_groups:
            for p in group["params"]:
                # Neither the kernels nor torch's fused update count this change, and copies of tables are kept by it.
                torch.autograd.graph.increment_version(p)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, the sparse ones too."""
        self._kept = None
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def _step_table(self, p: Tensor, group: dict[str, Any]) -> None:
        found = self._taken(p)
        if not found:
            return
        if p.grad is not None or len(found) > 2:
            self._write(p, found)
            return
        state, skip = self.state[p], getattr(self, "found_inf", None)
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1 if skip is None else 1 - skip
        rows = (_rows_of_latents(tensor) for tensor in (p, state["exp_avg"], state["exp_avg_sq"]))
        table, mean, square = rows
        numbers = AdamNumbers.of(group, state["step"], skip)
        backend_for(p).adam_step(table, mean, square, found, numbers)

    def _taken(self, p: Tensor) -> list[Contribution]:
        return [] if self._kept is None else self._kept.pop(_rows_of_latents(p))

    @torch.no_grad()
    def _write(self, p: Tensor, found: list[Contribution]) -> None:
        for one in found:
            kernels = backend_for(one.left)
            grad = kernels.spmm_transposed(one.values, one.support, one.left, self._sae.d_sae).to(p.dtype)
            grad = grad if grad.shape == p.shape and p.stride(-1) == 1 else grad.T
            p.grad = grad if p.grad is None else p.grad + grad


def _rows_of_latents(p: Tensor) -> Tensor:
    """A table as (d_sae, d) with contiguous rows, whichever way it is stored; other tensors as they are."""
    return p.T if p.dim() == 2 and p.stride(1) != 1 and p.stride(0) == 1 else p


def _fused(p: Tensor) -> bool:
    return p.dtype == torch.float32 and backend_for(p).ASYNCHRONOUS
