"""Scores in row chunks, selected from and dropped: rows x d_sae is never kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saehooks.codes import offsets_of
from saehooks.errors import WidthError
from saehooks.kernels.batch import Columns, batch_topk, check_budget, feature_choice
from saehooks.kernels.dispatch import path, select_rows
from saehooks.kernels.memory import empty
from saehooks.kernels.reference import check_k
from saehooks.kernels.rules import BatchRule, BatchTopK, FeatureChoice, RowRule, Support, TopK

SCORE_BYTES = 256 * 2**20
"""Most memory a chunk of scores takes."""

CPU_SCORE_BYTES = 128 * 2**20
"""The same on CPU, where larger chunks are no faster."""


def select(queries: Tensor, keys: Tensor, rule: RowRule | BatchRule, bias: Tensor | None = None) -> Support:
    """Select, for each query, from its scores against all keys.

    Args:
        queries: (rows, d).
        keys: (d_sae, d).
        rule: which scores are selected.
        bias: (d_sae,) added to every row of scores, or None.
    Returns:
        Support of the rows. No gradient: recompute the selected scores with `sddmm`.
    Raises:
        WidthError: queries and keys of different width.
        ConfigError: a rule that asks for more latents, or more rows, than there are.
    """
    if isinstance(rule, TopK):
        check_k(rule.k, keys.shape[0])
    rows, d_sae = queries.shape[0], keys.shape[0]
    if isinstance(rule, BatchTopK):
        check_budget(rule.k * rows, rows, d_sae)
    _check_widths(queries, keys)
    from_products = getattr(path(queries), "select_products", None)  # a path that makes the scores itself
    parts = None if from_products is None else from_products(queries, keys, rule, bias)
    if parts is not None:
        return join(parts, keys)
    if isinstance(rule, BatchTopK):
        return batch_topk(score_chunks(queries, keys, bias), rule.k * rows, rows, d_sae, keys.device)
    if isinstance(rule, FeatureChoice):
        return feature_choice(_columns(queries, keys, bias), rule.budgets, rows, column_block(queries))
    return join([select_rows(scores, rule) for scores in score_chunks(queries, keys, bias)], keys)


def column_block(queries: Tensor) -> int:
    """How many latents all rows can be scored against at a time."""
    return max(1, SCORE_BYTES // max(1, queries.shape[0] * _wide(queries).element_size()))


def _columns(queries: Tensor, keys: Tensor, bias: Tensor | None) -> Columns:
    queries = _wide(queries.detach())

    def scores(start: int, stop: int) -> Tensor:
        part = queries @ _wide(keys[start:stop].detach()).T
        return part if bias is None else part + bias[start:stop].detach().to(part.dtype)

    return scores


@torch.no_grad()
def score_chunks(queries: Tensor, keys: Tensor, bias: Tensor | None = None) -> Iterator[Tensor]:
    """Dense scores (chunk, d_sae) of consecutive rows, in one buffer that the next chunk overwrites.

    Half-precision inputs are scored in float32: rounding scores before selection costs up to 2% of the result.
    """
    _check_widths(queries, keys)
    queries, keys = _wide(queries.detach()), _wide(keys.detach())
    rows, d_sae = queries.shape[0], keys.shape[0]
    on_cpu = queries.device.type == "cpu" and queries.dtype == torch.float32
    room = (CPU_SCORE_BYTES if on_cpu else SCORE_BYTES) // max(1, d_sae * queries.element_size())
    chunks = -(-rows // max(1, room))
    step = -(-rows // max(1, chunks))
    buffer = empty(step, d_sae) if on_cpu else queries.new_empty(step, d_sae)
    for start in range(0, rows, max(1, step)):
        part = queries[start : start + step]
        scores = buffer[: part.shape[0]]
        if bias is None:
            torch.mm(part, keys.T, out=scores)
        else:
            torch.addmm(bias.detach().to(scores.dtype), part, keys.T, out=scores)
        yield scores


def _check_widths(queries: Tensor, keys: Tensor) -> None:
    if queries.dim() != 2 or keys.dim() != 2 or queries.shape[1] != keys.shape[1]:
        raise WidthError(
            f"queries (rows, d) and keys (d_sae, d) must agree in d, got {tuple(queries.shape)} and {tuple(keys.shape)}"
        )


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def join(parts: list[Support], like: Tensor) -> Support:
    """One Support of the rows of several, in order; empty and on the device of ``like`` when there are none."""
    if len(parts) == 1:
        return parts[0]
    empty = torch.zeros(0, dtype=torch.int64, device=like.device)
    if not parts:
        return Support(empty, empty.new_zeros(1), like.new_zeros(0))
    indices, sizes, threshold = zip(*((p.indices, p.offsets.diff(), p.threshold) for p in parts), strict=True)
    known = [part.scores for part in parts if part.scores is not None]
    scores = torch.cat(known) if len(known) == len(parts) else None
    return Support(torch.cat(indices), offsets_of(torch.cat(sizes)), torch.cat(threshold), scores)
