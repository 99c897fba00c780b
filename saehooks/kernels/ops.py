"""The operations everything else uses: checked, differentiable, on whichever backend serves the tensors."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from saehooks.errors import ConfigError, WidthError
from saehooks.kernels.backend import Backend, backend_for
from saehooks.kernels.rules import BatchRule, BatchTopK, RowRule
from saehooks.kernels.step import DEFAULT, Contribution, Step
from saehooks.support import Support

PLAIN = Step(backend="reference")
"""Plain torch, whose results can be differentiated."""


def select(
    queries: Tensor, keys: Tensor, rule: RowRule | BatchRule, bias: Tensor | None = None, *, step: Step = DEFAULT
) -> Support:
    """Select, for each query, from its scores against all keys.

    Args:
        queries: (rows, d).
        keys: (d_sae, d).
        rule: which scores are selected.
        bias: (d_sae,) added to every row of scores, or None.
        step: what the kernels know beside these.
    Returns:
        Support of the rows. No gradient: recompute the selected scores with `sddmm`.
    Raises:
        WidthError: queries and keys of different width, a bias or thresholds of another length than the keys.
        ConfigError: a rule that asks for more latents, or more rows, than there are.
    """
    check_widths(queries, keys, bias)
    rows, d_sae = queries.shape[0], keys.shape[0]
    rule.check(rows, d_sae)
    with torch.no_grad():
        return backend_for(queries, step).select_products(queries, keys, rule, bias, step).trusted(d_sae)


def select_rows(scores: Tensor, rule: RowRule, *, step: Step = DEFAULT) -> Support:
    """Select from given scores (rows, d_sae), without gradient.

    Raises:
        WidthError, ConfigError: as for `select`.
    """
    rule.check(*scores.shape)
    with torch.no_grad():
        return backend_for(scores, step).select_rows(scores, rule, step).trusted(scores.shape[1])


def select_pairs(p: Tensor, q: Tensor, rule: RowRule | BatchTopK, *, step: Step = DEFAULT) -> Support:
    """Select from the pairs (i, j) of each head, scored ``sqrt(p_i q_j)``, without gradient.

    Args:
        p, q: (rows, heads, m) and (rows, heads, n), not negative; latent ``(h m + i) n + j`` is pair (i, j) of head h.
        rule: which scores are selected.
        step: what the kernels know beside these.
    Raises:
        ConfigError: a rule that asks for more latents than there are.
    """
    d_sae = p.shape[1] * p.shape[2] * q.shape[2]
    rule.check(p.shape[0], d_sae)
    with torch.no_grad():
        return backend_for(p, step).select_pairs(p, q, rule, step).trusted(d_sae)


def select_pair_products(
    queries: Tensor, first: Tensor, second: Tensor, heads: int, rule: RowRule | BatchTopK, *, step: Step = DEFAULT
) -> Support:
    """`select_pairs` where p is ``relu(queries @ first.T)`` and q is ``relu(queries @ second.T)``.

    Args:
        queries: (rows, d).
        first, second: (heads * m, d) and (heads * n, d).
        heads: how many heads they hold.
        rule: which scores are selected.
        step: what the kernels know beside these.
    Raises:
        WidthError: queries and tables of different width.
        ConfigError: a rule that asks for more latents than there are.
    """
    for table in (first, second):
        check_widths(queries, table, None)
    d_sae = len(first) * (len(second) // heads)
    rule.check(queries.shape[0], d_sae)
    with torch.no_grad():
        found = backend_for(queries, step).select_pair_products(queries, first, second, heads, rule, step)
        return found.trusted(d_sae)


def check_widths(queries: Tensor, keys: Tensor, bias: Tensor | None) -> None:
    """Raise WidthError unless queries (rows, d), keys (d_sae, d) and bias (d_sae,) fit each other."""
    if queries.dim() != 2 or keys.dim() != 2 or queries.shape[1] != keys.shape[1]:
        raise WidthError(
            f"queries (rows, d) and keys (d_sae, d) must agree in d, got {tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    if bias is not None and bias.shape != keys.shape[:1]:
        raise WidthError(f"a bias of shape {tuple(bias.shape)} was given for {keys.shape[0]} latents")


def _check_product(left_rows: int | None, values: Tensor | None, support: Support, table: Tensor) -> None:
    """Raise unless the parts of a sparse product fit each other and no latent is out of range."""
    if table.dim() != 2:
        raise WidthError(f"a table has shape (d_sae, d), got {tuple(table.shape)}")
    if left_rows is not None and left_rows != support.n_rows:
        raise WidthError(f"{left_rows} rows were given with a support of {support.n_rows} rows")
    if values is not None and values.shape != support.indices.shape:
        raise WidthError(f"values {tuple(values.shape)} were given with {support.indices.numel()} entries")
    support.check(table.shape[0])


def is_differentiated(*inputs: Tensor | nn.Module | None) -> bool:
    """Whether what is made of some tensors, or of a module's parameters, may be asked for a gradient, or carry one
    forward."""
    if forward_ad._current_level >= 0:  # a dual tensor does not say that it is one
        return True
    if not torch.is_grad_enabled():
        return False
    tensors = chain.from_iterable(one.parameters() if isinstance(one, nn.Module) else (one,) for one in inputs)
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


# ------------------------------------------------------------- sparse products


def sddmm(
    left: Tensor,
    table: Tensor,
    support: Support,
    *,
    bias: Tensor | None = None,
    known: Tensor | None = None,
    step: Step = DEFAULT,
) -> Tensor:
    """Differentiable sampled product: ``left[row] . table[index] + bias[index]`` for every entry of a support.

    Args:
        left: (rows, d).
        table: (d_sae, d), one row a latent.
        support: of the rows.
        bias: (d_sae,), or None for none.
        known: (nnz,) the result, where selection had it at hand; only the gradient is computed then.
        step: what the kernels know beside these.
    Returns:
        (nnz,) products, in the order of the support's indices.
    Raises:
        LatentError: a support with a latent that the table does not have.
        WidthError: tensors that do not fit each other.
    """
    check_widths(left, table, bias)
    _check_product(left.shape[0], known, support, table)
    if known is not None and not is_differentiated(left, table, bias):
        return known.detach().to(left.dtype, copy=True)
    backend = backend_for(left, step)
    table, gradient = _shared(table, support, backend)
    return _Sddmm.apply(left, table, bias, support, known, gradient, backend, step)


def spmm(values: Tensor, support: Support, table: Tensor, *, step: Step = DEFAULT) -> Tensor:
    """Differentiable sparse product: row ``r`` of the result is the sum of ``value * table[index]`` over its entries.

    Args:
        values: (nnz,).
        support: row and latent of each value.
        table: (d_sae, d), one row a latent.
        step: what the kernels know beside these.
    Returns:
        (rows, d).
    Raises:
        LatentError: a support with a latent that the table does not have.
        WidthError: tensors that do not fit each other.
    """
    _check_product(None, values, support, table)
    backend = backend_for(table, step)
    table, gradient = _shared(table, support, backend)
    return _Spmm.apply(values, table, support, gradient, backend, step)


def sddmm_spmm(
    left: Tensor,
    table: Tensor,
    support: Support,
    *,
    values: Tensor | None = None,
    rate: Tensor | None = None,
    known: Tensor | None = None,
    step: Step = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """Differentiable ``moved = values + rate * sddmm(left, table)`` and ``spmm(moved, table)``, for less than the two.

    Forward and backward each gather the table's rows once, not twice.

    Args:
        left: (rows, d).
        table: (d_sae, d), one row a latent.
        support: of the rows.
        values: (nnz,) what the product is added to; None for 0.
        rate: () what it is multiplied by; None for 1.
        known: (nnz,) the product, where selection had it at hand; only without values and rate.
        step: what the kernels know beside these.
    Returns:
        (nnz,) moved values and (rows, d) their sums.
    Raises:
        LatentError: a support with a latent that the table does not have.
        WidthError: tensors that do not fit each other.
        ConfigError: a known product beside values or a rate, which it would leave out.
    """
    if known is not None and (values is not None or rate is not None):
        raise ConfigError("`known` is the whole result: give it without values and rate")
    check_widths(left, table, None)
    for entries in (values, known):
        _check_product(left.shape[0], entries, support, table)
    backend = backend_for(left, step)
    table, gradient = _shared(table, support, backend)
    return _SddmmSpmm.apply(left, table, values, rate, support, known, gradient, backend, step)


@torch.no_grad()
def refine(
    target: Tensor, table: Tensor, support: Support, values: Tensor, rate: Tensor, *, step: Step = DEFAULT
) -> Tensor:
    """One step of size ``rate`` down the squared error of ``spmm(values, table)``, on the support; without gradient.

    Args:
        target: (rows, d) what the sums should equal.
        table: (d_sae, d), one row a latent.
        support: of the rows.
        values: (nnz,) of its entries.
        rate: ().
        step: what the kernels know beside these.
    Returns:
        (nnz,) values, moved.
    Raises:
        LatentError: a support with a latent that the table does not have.
        WidthError: tensors that do not fit each other.
    """
    check_widths(target, table, None)
    _check_product(target.shape[0], values, support, table)
    return backend_for(table, step).refine(target, table, support, values, rate, step)


# ------------------------------------------------------------------------- rows


def for_rows(tensor: Tensor, *others: Tensor | None) -> Backend:
    """Whose operations on rows serve some tensors: a backend's have no gradient, so where one is asked for, it is plain
    torch."""
    return backend_for(tensor, PLAIN if is_differentiated(tensor, *others) else DEFAULT)


def squared_errors(left: Tensor, right: Tensor) -> Tensor:
    """(rows,) ``|left - right|^2`` of each row of two (rows, d), differentiable."""
    if forward_ad._current_level >= 0:
        return for_rows(left, right).squared_errors(left, right)
    return _SquaredErrors.apply(left, right, backend_for(left))


class _SquaredErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, left, right, backend: Backend):
        ctx.save_for_backward(left, right)
        return backend.squared_errors(left, right)

    @staticmethod
    def backward(ctx, grad):
        left, right = ctx.saved_tensors
        found = for_rows(left, right, grad).scaled_difference(left, right, 2 * grad)
        return found if ctx.needs_input_grad[0] else None, -found if ctx.needs_input_grad[1] else None, None


# ------------------------------------------------------------ gradients of tables


class _TableGradient:
    """What the products of one support add to a table's gradient, kept until all are known; it is written once."""

    def __init__(self) -> None:
        self._parts: dict[int, list[Contribution]] = {}
        """By backward pass."""

    def add(self, part: Contribution) -> None:
        self._parts.setdefault(torch._C._current_graph_task_id(), []).append(part)

    def take(self) -> list[Contribution]:
        """What this backward pass added."""
        return self._parts.pop(torch._C._current_graph_task_id(), [])


class _SharedTables:
    """The tables that products of one support read, each with its `_TableGradient`; copies and pickles have none."""

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, Tensor, _TableGradient]] = []

    def __deepcopy__(self, memo: dict) -> _SharedTables:
        return _SharedTables()

    def __reduce__(self) -> tuple:
        return _SharedTables, ()


def _shared(table: Tensor, support: Support, backend: Backend) -> tuple[Tensor, _TableGradient | None]:
    """The table as all products of a support read it, and where they leave their parts of its gradient."""
    if not (table.requires_grad and torch.is_grad_enabled()):
        return table, None
    tables = support.shared(_SharedTables)
    for held, seen, gradient in tables.found:
        if held is table:
            return seen, gradient
    gradient = _TableGradient()
    seen = _Gather.apply(table, gradient, backend)
    tables.found.append((table, seen, gradient))
    return seen, gradient


class _Gather(torch.autograd.Function):
    """A table as it is. Its gradient is the sum of what was left in a `_TableGradient`, made in one pass."""

    @staticmethod
    def forward(ctx, table, gradient: _TableGradient, backend: Backend):
        ctx.set_materialize_grads(False)
        ctx.gradient, ctx.backend, ctx.d_sae = gradient, backend, table.shape[0]
        return table.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        parts = ctx.gradient.take()
        if parts:
            found = ctx.backend.table_gradient(parts, ctx.d_sae)
            grad = found if grad is None else found.add_(grad)
        return grad, None, None


class _Sddmm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, left, table, bias, support: Support, known, gradient: _TableGradient | None, backend: Backend, step: Step
    ):
        ctx.save_for_backward(left, table)
        ctx.support, ctx.gradient, ctx.backend, ctx.step = support.pattern(), gradient, backend, step
        if known is not None:
            return known.detach().to(left.dtype, copy=True)
        found = backend.sddmm(left, table, support, step)
        return found if bias is None else found + bias[support.indices]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (left, table), support, backend = ctx.saved_tensors, ctx.support, ctx.backend
        d_left = d_bias = None
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            d_left = backend.spmm(grad, support, table, ctx.step)
        if ctx.needs_input_grad[1] and not ctx.step.keeps_gradient(table, grad, support, left):
            ctx.gradient.add(Contribution(grad, support, left))
        if ctx.needs_input_grad[2]:
            d_bias = backend.sum_by_latent(grad, support, table.shape[0])
        return d_left, None, d_bias, None, None, None, None, None


class _Spmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, table, support: Support, gradient: _TableGradient | None, backend: Backend, step: Step):
        ctx.save_for_backward(values, table)
        ctx.support, ctx.gradient, ctx.backend, ctx.step = support.pattern(), gradient, backend, step
        return backend.spmm(values, support, table, step)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (values, table), support, backend = ctx.saved_tensors, ctx.support, ctx.backend
        d_values = None
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            d_values = backend.sddmm(grad, table, support, ctx.step).to(values.dtype)
        if ctx.needs_input_grad[1] and not ctx.step.keeps_gradient(table, values, support, grad):
            ctx.gradient.add(Contribution(values, support, grad))
        return d_values, None, None, None, None, None


class _SddmmSpmm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, left, table, values, rate, support: Support, known, gradient: _TableGradient | None, backend, step: Step
    ):
        if known is None:
            moved, sums = backend.sddmm_spmm(left, table, support, values, rate, step)
        else:
            moved = known.detach().to(left.dtype, copy=True)
            sums = backend.spmm(moved, support, table, step)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(left, table, rate, moved)
        ctx.support, ctx.gradient, ctx.backend, ctx.step = support.pattern(), gradient, backend, step
        return moved, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, d_moved, d_sums):
        (left, table, rate, moved), support, backend = ctx.saved_tensors, ctx.support, ctx.backend
        if d_moved is None and d_sums is None:
            return (None,) * 9
        needs_sums = ctx.needs_input_grad[0] or ctx.needs_input_grad[3]
        weighed = None
        if d_sums is None:
            d_moved = d_moved.contiguous()
            weighed = backend.spmm(d_moved, support, table, ctx.step) if needs_sums else None
        elif needs_sums:
            d_sums = d_sums.contiguous()
            d_moved, weighed = backend.sddmm_spmm(d_sums, table, support, d_moved, None, ctx.step)
        else:
            d_sums = d_sums.contiguous()
            found = backend.sddmm(d_sums, table, support, ctx.step)
            d_moved = found if d_moved is None else found + d_moved
        d_left = d_rate = None
        if ctx.needs_input_grad[0]:
            d_left = weighed if rate is None else rate * weighed
        if ctx.needs_input_grad[3]:
            d_rate = (left * weighed).sum()
        if ctx.needs_input_grad[1]:
            scaled = d_moved if rate is None else rate * d_moved
            parts = [Contribution(scaled, support, left)]
            if d_sums is not None:
                parts.append(Contribution(moved, support, d_sums))
            for part in parts:
                if not ctx.step.keeps_gradient(table, *part):
                    ctx.gradient.add(part)
        d_values = d_moved if ctx.needs_input_grad[2] else None
        return d_left, None, d_values, d_rate, None, None, None, None, None


# --------------------------------------------------------- weights on the simplex


def simplex_thresholds(scores: Tensor, offsets: Tensor, *, scale: float = 1.0, step: Step = DEFAULT) -> Tensor:
    """(rows,) the tau of sparsemax over the entries of each row, without gradient: ``max(score - tau, 0)`` sums to 1.

    Args:
        scores: (nnz,) of compressed rows, each counted ``scale`` times.
        offsets: (rows + 1,) int64.
        scale: what the scores are multiplied by, in the widest type.
        step: what the kernels know beside these.
    Returns:
        float64 where the device has it; -inf for rows without entries, or with one that is not finite.
    """
    with torch.no_grad():
        return backend_for(scores, step).simplex_thresholds(scores, offsets, scale)


def simplex_weights(scores: Tensor, offsets: Tensor, *, step: Step = DEFAULT) -> Tensor:
    """(nnz,) sparsemax weights ``score - tau`` of given supports; the gradient is the sparsemax Jacobian.

    With g the gradient of the weights, a score receives ``g - mean of g over its row's support``. Sums are float64:
    over a support of thousands of large scores float32 would miss the threshold by more than the weights.

    Args:
        scores: (nnz,) of compressed rows.
        offsets: (rows + 1,) int64.
        step: what the kernels know beside these.
    """
    return _Centered.apply(scores, offsets, 1.0, backend_for(scores, step))


class _Centered(torch.autograd.Function):
    """A shift of each row to a given sum. Its gradient is the shift to the sum 0, which is its own gradient."""

    @staticmethod
    def forward(ctx, values, offsets, total: float, backend: Backend):
        ctx.save_for_backward(offsets)
        ctx.backend = backend
        return backend.center(values, offsets, total)

    @staticmethod
    def backward(ctx, grad):
        return _Centered.apply(grad, ctx.saved_tensors[0], 0.0, ctx.backend), None, None, None


def entmax_weights(scores: Tensor, offsets: Tensor, alpha: Tensor, *, step: Step = DEFAULT) -> Tensor:
    """(nnz,) entmax probabilities over the given supports, differentiable in scores (nnz,) and in alpha ().

    A row's probabilities are those of its scores alone: of the whole row, if its support is the entmax support. Sums
    are float64; on the GPU each has one order, so that results repeat, and the host waits for none.
    """
    return _EntmaxWeights.apply(scores, offsets, alpha, backend_for(scores, step))


class _EntmaxWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, offsets, alpha, backend: Backend):
        weights = backend.entmax_weights(scores, offsets, alpha)
        ctx.save_for_backward(weights, offsets, alpha)
        ctx.backend = backend
        return weights.to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weights, offsets, alpha = ctx.saved_tensors
        learned = ctx.needs_input_grad[2]
        d_scores, d_alpha = ctx.backend.entmax_gradient(weights, grad, offsets, alpha, learned)
        return d_scores, None, d_alpha.to(alpha.dtype) if learned else None, None
