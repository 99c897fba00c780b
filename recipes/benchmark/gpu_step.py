"""Whole training steps on the GPU: as CUDA graphs, launched from Python, and as `Trainer` makes them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from gpu_clock import Clock, Job, half_products
from gpu_measure import TOPK, Found, Row, case, product_ms
from gpu_others import others, packages
from gpu_report import ratio
from saehooks.kernels.copies import shared_copies
from torch import Tensor

from saehooks import SAE, TrainConfig, Trainer, kernels
from saehooks.training.losses import default_loss
from saehooks.training.optimiser import TableAdam


def our_gb(rows: int, d_sae: int, d_in: int) -> float:
    """Gigabytes that `_ours` takes at most: the table, its gradient and two optimisers' means, and the scores."""
    return 1e-9 * 4 * (8 * d_sae * d_in + 2 * rows * d_sae)


class Step(NamedTuple):
    """A training step on one batch, in parts."""

    backward: Job
    """Forward and backward."""
    whole: Job
    """And the optimiser's update."""


# ------------------------------------------------------------------ our own step


def our_sae(x: Tensor, keys: Tensor) -> SAE:
    """An SAE over the given concepts that selects about what the queries' own scores select."""
    scale = float(x.norm(dim=1).mean())
    sae = SAE(x.shape[1], keys.shape[0], device=x.device, key_scale=scale, center=False)
    with torch.no_grad():
        sae.dictionary.C.copy_(keys)
    return sae


def our_step(sae: SAE, x: Tensor) -> Step:
    """Gradients of tables stay sparse sums, which Adam's update reads."""
    adam = TableAdam(sae, lr=1e-6)

    def backward() -> None:
        adam.zero_grad()
        with adam.deferring():
            (sae(x).recons - x).square().sum().backward()

    def whole() -> None:
        backward()
        adam.step()

    return Step(backward, whole)


def written_step(sae: SAE, x: Tensor) -> Step:
    """Gradients are written, and torch's own fused Adam reads them; tables are read from one bfloat16 copy here too."""
    adam = torch.optim.Adam(sae.parameters(), lr=1e-6, fused=True, capturable=x.is_cuda)

    def backward() -> None:
        adam.zero_grad(set_to_none=True)
        with shared_copies():
            (sae(x).recons - x).square().sum().backward()

    def whole() -> None:
        backward()
        adam.step()

    return Step(backward, whole)


def stepped(args: argparse.Namespace, clock: Clock, d_in: int, d_sae: int) -> Found:
    """Forward and backward, and with Adam, against the encoder's product and the steps of others."""
    found: Found = {"step": [], "others": []}
    with half_products():
        for support in args.supports:
            x, keys = case(args.rows, d_sae, d_in, support, clock)
            row: Row = {"d_sae": d_sae, "d_in": d_in, "support": support}
            row["product ms"] = product_ms(clock, x, keys)
            ours = clock.tried(
                f"step, {d_sae} latents, support {support}",
                lambda x=x, keys=keys: _ours(clock, x, keys),
                our_gb(args.rows, d_sae, d_in),
            )
            row |= ours or {}
            row["fb / product"] = ratio(row.get("fb ms"), row["product ms"])
            row["M tokens/s"] = ratio(1e-3 * args.rows, row.get("step ms"))
            found["step"].append(row)
            if support == args.supports[0]:
                clock.tidy()
                found["others"] += others(clock, x, keys, row)
                found["others"] += packages(clock, x, keys, row) if (d_in, d_sae) == args.reference else []
    return found


def _ours(clock: Clock, x: Tensor, keys: Tensor) -> Row:
    sae = our_sae(x, keys)
    with torch.no_grad():
        entries = int(sae.encode(x).offsets[-1])
    row: Row = {"l0": entries / len(x)}
    written, fused = written_step(sae, x), our_step(sae, x)
    with kernels.capacity(max(1, int(1.25 * entries))) as room:
        row["fb ms"] = clock.graph_ms("fb", written.backward)
        row["step ms"] = clock.graph_ms("step", fused.whole)
        row["step, gradients written ms"] = clock.graph_ms("step, gradients written", written.whole)
        row["fb from Python ms"] = clock.ms(written.backward)
        row["step from Python ms"] = clock.ms(fused.whole)
        row["peak MB"] = clock.peak_mb(fused.whole)
        row["scores MB"] = 4 * x.shape[0] * keys.shape[0] / 2**20
        room.reset()
        fused.whole()
        if room.overflowed:
            clock.fail(f"step, {keys.shape[0]} latents", f"{room.used} entries, the capacity holds {room.entries}")
    return row


# ---------------------------------------------------------------- the trainer's step


def trained(args: argparse.Namespace, clock: Clock, d_in: int, d_sae: int) -> Found:
    """`Trainer.step` as a user calls it, launched from Python: time, and how often it waits for the device."""
    x, keys = case(args.rows, d_sae, d_in, args.supports[0], clock)
    cases: list[tuple[str, str, Callable[[], SAE]]] = [
        ("sparsemax, concepts", "medium", lambda: our_sae(x, keys)),
        ("topk, linear", "medium", lambda: SAE(d_in, d_sae, "linear", "topk", k=min(TOPK, d_sae), device=x.device)),
        ("sparsemax, concepts", "highest (torch's default)", lambda: our_sae(x, keys)),
    ]
    found = []
    for name, precision, make in cases:
        row: Row = {"SAE": name, "float32 products": precision, "d_sae": d_sae, "d_in": d_in}
        with half_products() if precision == "medium" else nullcontext():
            job = f"Trainer.step, {name}, {precision}"
            row |= clock.tried(job, lambda make=make: _trained(clock, make(), x), our_gb(args.rows, d_sae, d_in)) or {}
        row["M tokens/s"] = ratio(1e-3 * args.rows, row.get("step ms"))
        found.append(row)
    return {"trainer": found}


def _trained(clock: Clock, sae: SAE, x: Tensor) -> Row:
    every = 1 if clock.interpreted else 10
    loss = replace(default_loss(sae), dead_after=10**12)  # one batch again and again: else almost all would be dead
    config = TrainConfig(batch_size=len(x), lr=1e-6, buffer_rows=2 * len(x), log_every=every, loss=loss)
    trainer = Trainer(sae, config)

    def steps() -> None:
        for _ in range(every):
            trainer.step(x)

    steps()  # the first ones find out how large the codes are
    time = clock.host_ms(steps)
    waits, where = clock.waits(steps)
    return {
        "step ms": ratio(time.done, every),
        "step returns after ms": ratio(time.returned, every),
        "waits a step": ratio(waits, every),
        "where it waits": where,
        "peak MB": clock.peak_mb(steps),
    }
