"""Thresholds of a few scores, exactly: what selection from given scores and the screen settle with, in float64."""

from __future__ import annotations

import numpy as np
import torch

from saehooks.kernels.cpu.numba_jit import numba_jit
from saehooks.kernels.rules import Entmax, RowRule, Threshold, TopK

NONE = np.uint64(0)
"""Where counting begins in loops that write by a counter: one that could be negative is asked about at every write."""
SPARSEMAX, TOPK, THRESHOLD, ENTMAX = 0, 1, 2, 3
"""Kinds of rules, as the compiled loops take them."""


def described(rule: RowRule, d_sae: int) -> tuple[int, int, float, np.ndarray]:
    """Kind of rule, k, alpha and thetas, as the compiled loops take them."""
    none = np.zeros(1, np.float32)
    if isinstance(rule, TopK):
        return TOPK, rule.k, 2.0, none
    if isinstance(rule, Threshold):
        theta = torch.as_tensor(rule.theta, dtype=torch.float32, device="cpu").detach().reshape(-1)
        return THRESHOLD, 0, 2.0, theta.contiguous().numpy()
    if isinstance(rule, Entmax) and rule.alpha < 2:
        return ENTMAX, 0, float(rule.alpha), none
    return SPARSEMAX, 0, 2.0, none


@numba_jit
def newton(work, size, tau):
    """Exact sparsemax threshold of work[:size], shifted so that its maximum is 0, from a lower bound of it.

    Michelot's rule: drop what lies below the mean excess until nothing is dropped. Each pass halves the number of
    entries or the excess, so passes are few whatever the data. ``work`` is overwritten.
    """
    total = 0.0
    for j in range(size):
        total += work[j]
    tau = max(tau, (total - 1.0) / size)
    while True:
        kept = NONE
        total = 0.0
        for j in range(size):
            x = work[j]
            work[kept] = x
            kept += np.uint64(x > tau)
            total += x if x > tau else 0.0
        left = np.int64(kept)
        if left == size or left == 0:
            return tau
        tau = max(tau, (total - 1.0) / left)
        size = left


@numba_jit
def entmax_newton(work, size, power):
    """Exact entmax threshold of work[:size], (alpha - 1) times the scores shifted so that their maximum is 0.

    Newton's rule on ``sum of max(work - tau, 0)^power = 1`` with power 1 / (alpha - 1), from -1, which is below the
    root: the sum is convex and falls with tau, so no step overshoots and what lies below tau can be dropped.
    Source: Peters et al. 2019, arXiv:1905.05702. ``work`` is overwritten.
    """
    tau = -1.0
    for _ in range(100):
        kept = 0
        total = 0.0
        slope = 0.0
        for j in range(size):
            above = work[j] - tau
            if above > 0.0:
                work[kept] = work[j]
                kept += 1
                rest = above if power == 2.0 else above ** (power - 1.0)
                slope += rest
                total += rest * above
        size = kept
        step = (total - 1.0) / (power * slope)
        if not step > 1e-15:
            return tau
        tau += step
    return tau


@numba_jit
def kth_largest(keys, size, k):
    """The k-th largest of keys[:size], whole numbers, by halving their range: no order of the data makes it slow."""
    low = np.int64(keys[0])
    high = low
    for j in range(size):
        low = min(low, np.int64(keys[j]))
        high = max(high, np.int64(keys[j]))
    own = keys[:1].copy()  # of the keys' type, so that comparisons are no wider than they
    while low < high:
        middle = (low + high + 1) >> 1
        at_least = 0
        own[0] = middle
        pivot = own[0]
        for j in range(size):
            at_least += keys[j] >= pivot
        if at_least >= k:
            low = middle
        else:
            high = middle - 1
    own[0] = low
    return own[0]


@numba_jit
def ordered_key(bits):
    """An int32 that orders as the float32 of these bits does."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@numba_jit
def simplex_threshold(work, size, kind, alpha):
    """The threshold of work[:size], shifted so that its maximum is 0, by sparsemax or entmax; ``work`` is overwritten.

    That of a part of a row's scores is a lower bound of the row's.
    """
    if kind == SPARSEMAX:
        return newton(work, size, -1.0)
    power = 1.0 / (alpha - 1.0)
    for j in range(size):
        work[j] *= alpha - 1.0
    return entmax_newton(work, size, power) * power


@numba_jit
def settle(scores, places, found, work, kind, k, alpha, theta):
    """Keep, of some places and their scores, those that a rule selects from a row whose other scores are too small.

    Returns:
        How many are kept, at the front of both, and the threshold (0 for a rule that gives its own).
    """
    counted = NONE
    if kind == THRESHOLD:
        for j in range(found):
            place, score = places[j], scores[j]
            places[counted] = place
            scores[counted] = score
            counted += np.uint64(score > (theta[0] if theta.size == 1 else theta[place]))
        return np.int64(counted), 0.0
    if kind == TOPK:
        for j in range(found):
            place, score = places[j], scores[j]
            places[counted] = place
            scores[counted] = score
            counted += np.uint64(score > 0.0)
        kept = np.int64(counted)
        if kept < k:
            return kept, 0.0
        return _largest_positive(scores, places, kept, work, k)
    shift = np.float64(scores[0])
    for j in range(found):
        shift = max(shift, np.float64(scores[j]))
    for j in range(found):
        work[j] = np.float64(scores[j]) - shift
    tau = simplex_threshold(work, found, kind, alpha)
    for j in range(found):
        place, score = places[j], scores[j]
        places[counted] = place
        scores[counted] = score
        counted += np.uint64(np.float64(score) - shift > tau)
    return np.int64(counted), shift + tau


@numba_jit
def _largest_positive(scores, places, found, work, k):
    """Keep the k largest of positive scores, of equals the first; return k and the smallest."""
    keys = work.view(np.int32)
    bits = scores.view(np.int32)  # of positive numbers: they order alike
    for j in range(found):
        keys[j] = bits[j]
    smallest = kth_largest(keys, found, k)
    ties = k
    for j in range(found):
        ties -= keys[j] > smallest
    kept = 0
    for j in range(found):
        if keys[j] > smallest or (keys[j] == smallest and ties > 0):
            ties -= keys[j] == smallest
            places[kept] = places[j]
            scores[kept] = scores[j]
            kept += 1
    return kept, np.float64(np.int32(smallest).view(np.float32))
