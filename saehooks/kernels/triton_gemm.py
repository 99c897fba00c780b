"""The score product without its output: only scores that reach their row's bound leave the kernel.

The bound of a row comes from every STEP-th latent, scored beforehand: the threshold of any subset bounds the row's
own from below. Hits are appended to the row's list by an integer atomic, so their order varies; `order` sorts each
list by latent before anything is summed, so results do not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saehooks.kernels.triton_thresholds import finite


@triton.jit
def scores_above(
    QUERIES, query_stride, KEYS, key_stride, BIAS, BOUND, VALUES, PLACES, COUNTS, rows, others, width,
    STEP: tl.constexpr, BIASED: tl.constexpr, CAP: tl.constexpr,
    ROWS: tl.constexpr, LATENTS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One tile of queries against the latents that are no multiple of STEP; scores that reach the bound are listed."""
    row_tiles = tl.cdiv(rows, ROWS)
    latent_tiles = tl.cdiv(others, LATENTS)
    # Bands of BAND row tiles: their queries and the same few keys stay in the L2 cache.
    band = tl.program_id(0) // (BAND * latent_tiles)
    within = tl.program_id(0) % (BAND * latent_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    row = (band * BAND + within % height) * ROWS + tl.arange(0, ROWS)
    other = (within // height) * LATENTS + tl.arange(0, LATENTS)
    latent = other + other // (STEP - 1) + 1
    depth = tl.arange(0, DEPTH)
    # Out of range: read the last row again; its hits are masked below.
    query_at = QUERIES + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * query_stride + depth[None, :]
    last = others - 1
    key_row = tl.where(other < others, latent, last + last // (STEP - 1) + 1)
    key_at = KEYS + key_row.to(tl.int64)[None, :] * key_stride + depth[:, None]
    z = tl.zeros((ROWS, LATENTS), tl.float32)
    for begin in range(0, width, DEPTH):
        inside = begin + depth < width
        query = tl.load(query_at + begin, mask=inside[None, :], other=0.0)
        key = tl.load(key_at + begin, mask=inside[:, None], other=0.0)
        z = tl.dot(query, key, z, input_precision="ieee")
    if BIASED:
        z += tl.load(BIAS + key_row)[None, :]
    bound = tl.load(BOUND + row, mask=row < rows, other=float("inf"))
    real = (row < rows)[:, None] & (other < others)[None, :]
    # Not "z >= bound": a NaN on either side must be seen.
    hit = real & ((z < bound[:, None]) == 0)
    if tl.sum(tl.sum(hit.to(tl.int32), 1), 0) > 0:
        N: tl.constexpr = ROWS * LATENTS
        flat = tl.reshape(z, (N,))
        hits = tl.reshape(hit, (N,))
        rows_of = tl.reshape(row[:, None] + tl.zeros((ROWS, LATENTS), tl.int32), (N,)).to(tl.int64)
        place = tl.reshape(latent[None, :] + tl.zeros((ROWS, LATENTS), tl.int32), (N,))
        slot = tl.atomic_add(COUNTS + rows_of, 1, mask=hits, sem="relaxed")
        kept = hits & (slot < CAP)
        tl.store(VALUES + rows_of * CAP + slot, flat, mask=kept)
        tl.store(PLACES + rows_of * CAP + slot, place, mask=kept)


@triton.jit
def order(VALUES, PLACES, COUNTS, BEST, CAP: tl.constexpr):
    """Sort a row's list by latent and find its best; a list with a score that is not finite counts as incomplete."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(COUNTS + row)
    slot = tl.arange(0, CAP)
    z = tl.load(VALUES + row * CAP + slot, mask=slot < n, other=float("-inf"))
    place = tl.load(PLACES + row * CAP + slot, mask=slot < n, other=2147483647)
    low = z.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    key = tl.sort((place.to(tl.int64) << 32) | low, 0)
    z = key.to(tl.int32).to(tl.float32, bitcast=True)
    strange = tl.sum(((slot < n) & (finite(z) == 0)).to(tl.int32), 0)
    tl.debug_barrier()
    tl.store(VALUES + row * CAP + slot, z, mask=slot < n)
    tl.store(PLACES + row * CAP + slot, (key >> 32).to(tl.int32), mask=slot < n)
    tl.store(BEST + row, tl.where(n > 0, tl.max(z, 0), 0.0))
    if (strange > 0) & (n <= CAP):
        tl.store(COUNTS + row, CAP + 1)
