"""Training steps of others on the GPU: their algorithms in plain torch, and their packages where installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_clock import Clock
from gpu_measure import TOPK, Row
from gpu_report import ratio
from peers import (
    Peer,
    installed,
    plain_sae_lens_topk,
    plain_sparsify_topk,
    published_sparsemax,
    sae_lens_topk,
    sparsify_topk,
)
from torch import Tensor


def others(clock: Clock, x: Tensor, keys: Tensor, ours: Row) -> list[Row]:
    """Algorithms of others in plain torch."""
    d_sae, d_in = keys.shape
    sizes = d_in, d_sae, min(TOPK, d_sae), x.device
    makers: dict[str, Callable[[], Peer]] = {
        "SAELens TopK": lambda: plain_sae_lens_topk(*sizes),
        "sparsify TopK": lambda: plain_sparsify_topk(*sizes),
        "published sparsemax": lambda: published_sparsemax(keys, float(x.norm(dim=1).mean())),
    }
    return [_other(clock, x, d_sae, ours, name, make) for name, make in makers.items()]


def packages(clock: Clock, x: Tensor, keys: Tensor, ours: Row) -> list[Row]:
    """The peers' own packages, where they are installed."""
    d_sae, d_in = keys.shape
    sizes = d_in, d_sae, min(TOPK, d_sae), x.device
    makers: dict[str, tuple[str, Callable[[], Peer]]] = {
        "SAELens package, dense": ("sae_lens", lambda: sae_lens_topk(*sizes)),
        "SAELens package, as it comes": ("sae_lens", lambda: sae_lens_topk(*sizes, rescale=True)),
        "SAELens package, sparse": ("sae_lens", lambda: sae_lens_topk(*sizes, sparse=True)),
        "sparsify package": ("sparsify", lambda: sparsify_topk(*sizes)),
    }
    found = []
    for name, (package, make) in makers.items():
        if installed(package):
            found.append(_other(clock, x, d_sae, ours, name, make))
        else:
            found.append({"who": name, "d_sae": d_sae, "d_in": d_in, "note": "package not installed"})
    return found


def _other(clock: Clock, x: Tensor, d_sae: int, ours: Row, name: str, make: Callable[[], Peer]) -> Row:
    """A peer's row, launched from Python like ours beside it; where it cannot run, the reason is among the skipped."""
    needed = their_gb(len(x), d_sae, x.shape[1])
    row: Row = {"who": name, "d_sae": d_sae, "d_in": x.shape[1]}
    job = f"{name}, {d_sae} latents x {x.shape[1]}"
    row |= clock.tried(job, lambda: _times(clock, make(), x), needed, theirs=True) or {}
    row["fb / ours"] = ratio(row.get("fb ms"), ours.get("fb from Python ms"))
    row["step / ours"] = ratio(row.get("step ms"), ours.get("step from Python ms"))
    row["step / our graph"] = ratio(row.get("step ms"), ours.get("step ms"))
    clock.tidy()
    return row


def their_gb(rows: int, d_sae: int, d_in: int) -> float:
    """Gigabytes of a dense step: two tables with gradients, means and half-precision copies; some ten dense codes."""
    return 1e-9 * (2 * 24 * d_sae * d_in + 40 * rows * d_sae)


def _times(clock: Clock, peer: Peer, x: Tensor) -> Row:
    """Forward and backward, a whole step with fused Adam, and its peak memory; products in bfloat16."""
    adam = torch.optim.Adam(peer.model.parameters(), lr=1e-6, fused=True)

    def backward() -> None:
        adam.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=peer.autocast and x.is_cuda):
            loss = peer.loss(x)
        loss.backward()

    def step() -> None:
        backward()
        peer.adjust()
        adam.step()

    return {"fb ms": clock.ms(backward), "step ms": clock.ms(step), "peak MB": clock.peak_mb(step)}
