"""Kernels for float32 on CPU, as loops compiled by numba; other dtypes take the reference."""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch
from torch import Tensor

from saehooks.codes import offsets_of
from saehooks.kernels import cpu_dense, cpu_products, cpu_select, reference
from saehooks.kernels.columns import columns
from saehooks.kernels.memory import empty
from saehooks.kernels.rules import Entmax, RowRule, Sparsemax, Support, Threshold, TopK
from saehooks.kernels.threads import blocks, spread

RULES = (Sparsemax, Entmax, TopK, Threshold)
"""What these loops know; the reference selects by other rules."""

GRAIN = 2**19
"""Scores or products that are worth a thread of their own: some 0.2 ms of work."""


def serves(tensor: Tensor) -> bool:
    """Whether these loops take tensors of this device and dtype."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def select(scores: Tensor, rule: RowRule) -> Support:
    """Select from given scores (rows, d_sae) by a row rule."""
    rows, d_sae = scores.shape
    if not serves(scores) or not isinstance(rule, RULES) or rows == 0 or d_sae == 0:
        return reference.select(scores, rule)
    kind, k, alpha, theta = _plan(rule, d_sae)
    groups = cpu_select.group_count(d_sae, k)
    matrix = scores.detach().contiguous().numpy()
    sizes = torch.empty(rows, dtype=torch.int64)
    thresholds = torch.full((rows,), float(theta.min()), dtype=torch.float32)
    size_array, threshold_array = sizes.numpy(), thresholds.numpy()

    def work(start: int, stop: int) -> list[tuple[np.ndarray, np.ndarray]]:
        parts = []
        room = max(d_sae, (stop - start) * max(128, 2 * k))
        while start < stop:
            indices, picked = np.empty(room, np.int64), np.empty(room, np.float32)
            start, used = cpu_select.select_rows(
                matrix, start, stop, kind, k, alpha, theta, groups, indices, picked, size_array, threshold_array
            )
            parts.append((indices[:used], picked[:used]))
            room = max(d_sae, 2 * room)
        return parts

    parts = chain.from_iterable(spread(work, blocks(rows, max(1, GRAIN // d_sae))))
    indices, picked = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
    return Support(indices, offsets_of(sizes), thresholds, picked)


def _plan(rule: RowRule, d_sae: int) -> tuple[int, int, float, np.ndarray]:
    """Kind of rule, k, alpha and thetas, as the compiled loop takes them."""
    none = np.zeros(1, np.float32)
    if isinstance(rule, TopK):
        reference.check_k(rule.k, d_sae)
        return cpu_select.TOPK, rule.k, 2.0, none
    if isinstance(rule, Threshold):
        theta = torch.as_tensor(rule.theta, dtype=torch.float32).detach().reshape(-1)
        return cpu_select.THRESHOLD, 0, 2.0, theta.contiguous().numpy()
    if isinstance(rule, Entmax) and rule.alpha < 2:
        return cpu_select.ENTMAX, 0, float(rule.alpha), none
    return cpu_select.SPARSEMAX, 0, 2.0, none


def sddmm(left: Tensor, table: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    """(nnz,) products ``left[row] . table[index]`` of the sampled entries; left (rows, d), table (d_sae, d)."""
    if not (serves(left) and serves(table)):
        return reference.sddmm(left, table, indices, offsets)
    if cpu_dense.pays(indices.numel(), offsets.numel() - 1, table.shape[0]):
        return cpu_dense.sddmm(left.detach(), table.detach(), indices, offsets)
    out = torch.empty(indices.numel())
    arrays = _arrays(left, table, indices, offsets)
    spread(
        lambda start, stop: cpu_products.sddmm_rows(*arrays, start, stop, out.numpy()),
        _row_blocks(offsets, indices, table.shape[1]),
    )
    return out


def spmm(values: Tensor, indices: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """(rows, d) sums ``values @ table[indices]`` of each compressed row."""
    if not (serves(values) and serves(table)):
        return reference.spmm(values, indices, offsets, table)
    if cpu_dense.pays(indices.numel(), offsets.numel() - 1, table.shape[0], table.detach()):
        return cpu_dense.spmm(values.detach(), indices, offsets, table.detach())
    out = empty(offsets.numel() - 1, table.shape[1])
    arrays = _arrays(values, indices, offsets, table)
    spread(
        lambda start, stop: cpu_products.spmm_rows(*arrays, start, stop, out.numpy()),
        _row_blocks(offsets, indices, table.shape[1]),
    )
    return out


def spmm_transposed(values: Tensor, indices: Tensor, offsets: Tensor, left: Tensor, d_sae: int) -> Tensor:
    """(d_sae, d) gradient of a table: row ``i`` sums ``value * left[row]`` over the entries with index ``i``."""
    if not (serves(values) and serves(left)):
        return reference.spmm_transposed(values, indices, offsets, left, d_sae)
    if cpu_dense.pays(indices.numel(), offsets.numel() - 1, d_sae, left.detach()):
        return cpu_dense.spmm_transposed(values.detach(), indices, offsets, left.detach(), d_sae)
    starts, rows, places = columns(indices, offsets, d_sae)
    out = empty(d_sae, left.shape[1])
    arrays = (values.detach()[places].numpy(), rows.numpy(), starts.numpy(), left.detach().contiguous().numpy())
    spread(
        lambda start, stop: cpu_products.spmm_rows(*arrays, start, stop, out.numpy()),
        blocks(d_sae, max(1, GRAIN // left.shape[1])),
    )
    return out


def _arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(tensor.detach().contiguous().numpy() for tensor in tensors)


def _row_blocks(offsets: Tensor, indices: Tensor, width: int) -> list[tuple[int, int]]:
    rows = offsets.numel() - 1
    each = max(1, indices.numel() * width // max(1, rows))
    return blocks(rows, max(1, GRAIN // each))
