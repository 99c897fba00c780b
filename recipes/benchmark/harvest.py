"""Where the time of a training goes: the model's forward, the SAE, the optimiser, the buffer; and harvesting alone.

    python recipes/benchmark/harvest.py [--quick] [--device cuda]

Harvesting stops each forward at the site, so at half depth it costs half a forward. Several SAEs of one site train on
the rows of one harvest. The model has 12 blocks of width 576 and random weights.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from attach import Decoder
from common import Bench, Case, Job, Row, arguments, concept_sae

import saehooks as sh
from saehooks.streams import harvest

CASES = [Case(1024, 24576), Case(1024, 3072)]
SITE = "blocks.5"


def harvesting(bench: Bench, model: Any, tokens: torch.Tensor) -> Row:
    """A whole forward, one with a hook that copies the activations, and ours."""

    def copying() -> None:
        kept = []
        handle = model.get_submodule(SITE).register_forward_hook(lambda module, given, out: kept.append(out.clone()))
        model(tokens)
        handle.remove()

    jobs: dict[str, Job] = {
        "forward": lambda: model(tokens),
        "hook and copy": copying,
        "harvest": lambda: list(harvest(model, [tokens], SITE)),
    }
    with torch.no_grad():
        return bench.time(jobs, "forward")


def split(bench: Bench, model: Any, case: Case, batches: list[torch.Tensor], saes: int) -> Row:
    """Shares of a training's time by part, with one SAE or several fed from one harvest."""
    trainers = []
    for _ in range(saes):
        sae, _ = concept_sae(case, torch.randn(64, case.d_in, device=bench.device))
        trainers.append(sh.Trainer(sae, sh.TrainConfig(batch_size=case.rows, buffer_rows=4 * case.rows)))
    clock = time.thread_time if bench.args.clock == "cpu" else time.perf_counter
    model_seconds, started = 0.0, clock()
    rows_from = harvest(model, batches, SITE)
    while True:
        began = clock()
        rows = next(rows_from, None)
        model_seconds += clock() - began
        if rows is None:
            break
        for trainer in trainers:
            trainer.push(rows)
    for trainer in trainers:
        trainer.drain()
    whole = clock() - started
    parts = {name: sum(t.seconds[name] for t in trainers) for name in ("sae", "optimizer", "buffer")}
    # The trainer's own clock is wall time: on a busy machine only its proportions are meant.
    share = (whole - model_seconds) / max(sum(parts.values()), 1e-9)
    parts = {"model": model_seconds, **{name: seconds * share for name, seconds in parts.items()}}
    return {name: {"ms": 1e3 * seconds, "ratio": seconds / whole} for name, seconds in parts.items()}


def main() -> None:
    bench = Bench(arguments(__doc__.splitlines()[0]))
    model = Decoder().to(bench.device).eval()
    tokens = torch.randint(0, 8192, (8, 128), device=bench.device)
    bench.add("harvest", CASES[0], harvesting(bench, model, tokens))
    for case in CASES[:1] if bench.args.quick else CASES:
        for saes in (1, 3):
            bench.add("training, shares", case, split(bench, model, case, [tokens] * 12, saes), saes=saes)
    bench.save("harvest")


if __name__ == "__main__":
    main()
