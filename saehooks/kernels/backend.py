"""The operations that every backend must have, and which backend serves a tensor.

A backend is a folder of this room: ``reference`` (plain torch, any device and dtype), ``cpu`` (float32, numba),
``gpu`` (Triton). Each has the same files: `select`, `pairs`, `products`, `rows`, `weights`, `across_rows`, `adam`;
what one has no faster form of, it takes from the reference.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from saehooks.errors import ConfigError
from saehooks.kernels.rules import BatchRule, BatchTopK, RowRule
from saehooks.kernels.step import DEFAULT, Contribution, Step
from saehooks.support import Support

if TYPE_CHECKING:
    from saehooks.kernels.reference.adam import AdamNumbers

BACKENDS = ("reference", "cpu", "gpu")

FORCED = os.environ.get("SAEHOOKS_KERNELS") or None
"""The backend of the whole process, if its environment names one."""


class Backend(Protocol):
    """The operations of a backend. All take their tensors on one device; results live there too."""

    NAME: str
    """Which of `BACKENDS` it is."""
    ASYNCHRONOUS: bool
    """Whether the host may run ahead: selection fills a `Capacity`, tables keep sparse gradients for `adam_step`."""

    def select_rows(self, scores: Tensor, rule: RowRule, step: Step = DEFAULT) -> Support:
        """Support of given scores (rows, d_sae)."""

    def select_products(
        self, queries: Tensor, keys: Tensor, rule: RowRule | BatchRule, bias: Tensor | None, step: Step = DEFAULT
    ) -> Support:
        """Support of the scores ``queries (rows, d) @ keys.T (d, d_sae) + bias (d_sae,)``, which are not all kept."""

    def select_pairs(self, p: Tensor, q: Tensor, rule: RowRule | BatchTopK, step: Step = DEFAULT) -> Support:
        """Support of the pairs (i, j) of heads, scored ``sqrt(p_i q_j)``; p (rows, heads, m), q (rows, heads, n)."""

    def select_pair_products(
        self,
        queries: Tensor,
        first: Tensor,
        second: Tensor,
        heads: int,
        rule: RowRule | BatchTopK,
        step: Step = DEFAULT,
    ) -> Support:
        """`select_pairs` of ``relu(queries @ first.T)`` and of second; first (heads * m, d), second (heads * n, d)."""

    def sddmm(self, left: Tensor, table: Tensor, support: Support, step: Step = DEFAULT) -> Tensor:
        """(nnz,) products ``left[row] . table[index]`` of the entries; left (rows, d), table (d_sae, d)."""

    def spmm(self, values: Tensor, support: Support, table: Tensor, step: Step = DEFAULT) -> Tensor:
        """(rows, d) sums ``values @ table[indices]`` of each row; values (nnz,), table (d_sae, d)."""

    def sddmm_spmm(
        self,
        left: Tensor,
        table: Tensor,
        support: Support,
        values: Tensor | None,
        rate: Tensor | None,
        step: Step = DEFAULT,
    ) -> tuple[Tensor, Tensor]:
        """(nnz,) ``values + rate * sddmm(left, table)``, and (rows, d) the sums `spmm` of these.

        ``values`` (nnz,) None counts as 0, ``rate`` () as 1. Together they gather the table's rows once.
        """

    def refine(
        self, target: Tensor, table: Tensor, support: Support, values: Tensor, rate: Tensor, step: Step = DEFAULT
    ) -> Tensor:
        """(nnz,) ``values + rate * sddmm(target - spmm(values, table), table)``; target (rows, d), rate ()."""

    def spmm_transposed(self, values: Tensor, support: Support, left: Tensor, d_sae: int) -> Tensor:
        """(d_sae, d) gradient of a table: row ``i`` sums ``value * left[row]`` over the entries with index ``i``."""

    def table_gradient(self, parts: list[Contribution], d_sae: int) -> Tensor:
        """(d_sae, d) the sum of one or more `spmm_transposed`, in new memory."""

    def sum_by_latent(self, values: Tensor, support: Support, d_sae: int) -> Tensor:
        """(d_sae,) sums of the values (nnz,) of each latent, always in the same order."""

    def row_products(self, left: Tensor, right: Tensor) -> Tensor:
        """(rows,) sums of ``left * right`` of each row of two (rows, d)."""

    def directions(self, x: Tensor, offset: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        """(rows, d) ``c / (|c| + eps)`` and (rows,) ``|c|`` of ``c = x - offset``; x (rows, d), offset (d,)."""

    def scaled_gradient(self, grad: Tensor, recons: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients (rows, d) and (rows,) of recons and scale in ``recons * scale[:, None]``, from its own."""

    def squared_errors(self, left: Tensor, right: Tensor) -> Tensor:
        """(rows,) ``|left - right|^2`` of each row of left (rows, d) and right (rows, d), or (1, d) for all."""

    def scaled_difference(self, left: Tensor, right: Tensor, factor: Tensor) -> Tensor:
        """(rows, d) ``factor[:, None] * (left - right)`` of two (rows, d), factor (rows,)."""

    def simplex_thresholds(self, scores: Tensor, offsets: Tensor, scale: float) -> Tensor:
        """(rows,) float64 tau of sparsemax over the ``scale * scores`` (nnz,) of each row; -inf where there is none."""

    def center(self, values: Tensor, offsets: Tensor, total: float) -> Tensor:
        """(nnz,) values shifted by a constant in each row, so that the row sums to ``total``."""

    def entmax_weights(self, scores: Tensor, offsets: Tensor, alpha: Tensor) -> Tensor:
        """(nnz,) float64 entmax probabilities of compressed rows of scores (nnz,), alpha () on their device."""

    def entmax_gradient(
        self, weights: Tensor, grad: Tensor, offsets: Tensor, alpha: Tensor, learned: bool
    ) -> tuple[Tensor, Tensor]:
        """(nnz,) gradient of the scores, in the dtype of ``grad``, and () float64 of alpha, 0 unless it is learned."""

    def adam_step(
        self,
        table: Tensor,
        mean: Tensor,
        square: Tensor,
        gradient: list[Contribution] | Tensor,
        numbers: AdamNumbers,
    ) -> None:
        """One step of Adam on a table (d_sae, d), in place, its gradient given as sparse sums or written."""


def backend_for(tensor: Tensor, step: Step = DEFAULT) -> Backend:
    """The backend that serves a tensor, of any shape: the step's, else the environment's, else the fastest for it.

    Raises:
        ConfigError: a name that is no backend's.
    """
    name = step.backend or FORCED or _fastest(tensor)
    if name not in BACKENDS:
        raise ConfigError(f"no kernel backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return _module(name)


@cache
def _module(name: str) -> Backend:
    return cast(Backend, import_module(f"saehooks.kernels.{name}"))


def _fastest(tensor: Tensor) -> str:
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32 and _has_numba():
        return "cpu"
    if tensor.device.type == "cuda" and tensor.dtype != torch.float64 and _has_kernels(tensor.device):
        return "gpu"
    return "reference"


@cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


@cache
def _has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run on this GPU; if not, warns, once, that plain torch serves it."""
    try:
        import_module("saehooks.kernels.gpu").probe(device)
    except Exception as error:  # whatever keeps them from running (no Triton, no C compiler, an old GPU): torch runs
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        warnings.warn(
            f"the Triton kernels do not run on {device} ({reason}); saehooks uses plain torch there, which gives the "
            "same results more slowly",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
