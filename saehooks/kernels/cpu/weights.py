"""Thresholds of compressed rows of float32 on CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from saehooks.kernels.cpu.numba_jit import numba_jit
from saehooks.kernels.cpu.products import serves
from saehooks.kernels.cpu.threads import GRAIN, blocks, spread
from saehooks.kernels.cpu.thresholds import newton
from saehooks.kernels.reference import weights as reference


def simplex_thresholds(scores: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """(rows,) float64 tau of sparsemax over the ``scale * scores`` (nnz,) of each row; -inf where there is none."""
    if not serves(scores):
        return reference.simplex_thresholds(scores, offsets, scale)
    rows = offsets.numel() - 1
    thresholds = torch.empty(rows, dtype=torch.float64, device="cpu")
    arrays = scores.detach().contiguous().numpy(), offsets.contiguous().numpy(), float(scale), thresholds.numpy()
    each = max(1, scores.numel() // max(1, rows))
    spread(lambda start, stop: _threshold_range(*arrays, start, stop), blocks(rows, max(1, GRAIN // (16 * each))))
    return thresholds


@numba_jit
def _threshold_range(scores, offsets, scale, thresholds, start, stop):
    """Write the thresholds of rows start to stop."""
    longest = 0
    for r in range(start, stop):
        longest = max(longest, offsets[r + 1] - offsets[r])
    work = np.empty(longest, np.float64)
    for r in range(start, stop):
        first = offsets[r]
        size = offsets[r + 1] - first
        largest = -np.inf
        total = 0.0
        for j in range(size):
            work[j] = np.float64(scores[first + j]) * scale
            largest = max(largest, work[j])
            total += work[j]
        if size == 0 or not abs(total) < np.inf:
            thresholds[r] = -np.inf
            continue
        for j in range(size):
            work[j] -= largest
        thresholds[r] = largest + newton(work, size, -1.0)
