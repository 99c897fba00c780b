"""Where the time of a training goes: the model's forward, the SAE, the optimiser, the buffer; and harvesting alone.

    python recipes/benchmark/harvest.py [--quick] [--device cuda]

Harvesting stops each forward at the site, so at half depth it costs half a forward. Several SAEs of one site train on
the rows of one harvest. The model has 12 blocks of width 576 and random weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import Decoder, arguments, figure, interleaved, machine, save, summary, table
from train_step import WIDTH, concepts

import saehooks as sh
from saehooks.streams import ShuffleBuffer, harvest


def harvesting(args: Any, model: Any, site: str, tokens: torch.Tensor) -> dict[str, Any]:
    """A whole forward, one with a hook that copies the activations, and ours."""

    def copying() -> None:
        kept = []
        handle = model.get_submodule(site).register_forward_hook(lambda module, given, out: kept.append(out.clone()))
        model(tokens)
        handle.remove()

    def ours() -> None:
        for _ in harvest(model, [tokens], site):
            pass

    with torch.no_grad():
        jobs: dict[str, Callable[[], Any]] = {
            "forward": lambda: model(tokens),
            "hook and copy": copying,
            "harvest": ours,
        }
        return summary(interleaved(jobs, args), "forward")


def split(args: Any, model: Any, site: str, d_sae: int, batches: list[torch.Tensor], saes: int) -> dict[str, Any]:
    """Seconds of a training by part, with one SAE or several fed from one harvest."""
    trainers = []
    for _ in range(saes):
        sae, _ = concepts(d_sae, torch.randn(64, WIDTH, device=args.device))
        trainers.append(sh.Trainer(sae, sh.TrainConfig(batch_size=1024, buffer_rows=4096)))
    clock = time.thread_time if args.clock == "cpu" else time.perf_counter
    model_seconds, started = 0.0, clock()
    rows_from = harvest(model, batches, site)
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
    return {"saes": saes, "d_sae": d_sae, "steps": trainers[0].steps, "share": {k: v / whole for k, v in parts.items()}}


def shuffling(args: Any) -> float:
    """Microseconds a row spends in the shuffle buffer."""
    buffer = ShuffleBuffer(16384, WIDTH, 1024, device=args.device)
    rows = torch.randn(4096, WIDTH, device=args.device)
    served = 0

    def job() -> None:
        nonlocal served
        served += sum(len(batch) for batch in buffer.add(rows))

    for _ in range(4):
        job()
    served, times = 0, interleaved({"buffer": job}, args)["buffer"]
    return sum(times) / len(times) / 4096 * 1e6


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    print(machine(args))
    torch.manual_seed(0)
    model = Decoder(WIDTH, layers=4 if args.quick else 12).to(args.device).eval()
    site = "blocks.1" if args.quick else "blocks.5"
    tokens = torch.randint(0, 8192, (8, 128), device=args.device)
    found: dict[str, Any] = {"harvesting": harvesting(args, model, site, tokens)}
    print("\nHarvesting at half depth, in units of a forward:")
    print(table([(name, times["ratio"]) for name, times in found["harvesting"].items()], ("", "forwards")))
    batches = [tokens] * (6 if args.quick else 12)
    latents = (3072,) if args.quick else (3072, 24576)
    found["split"] = [split(args, model, site, m, batches, n) for m in latents for n in (1, 3)]
    parts = tuple(found["split"][0]["share"])
    print("\nShares of the time of a training:")
    print(table([(s["d_sae"], s["saes"], *s["share"].values()) for s in found["split"]], ("latents", "SAEs", *parts)))
    found["buffer_microseconds_per_row"] = shuffling(args)
    print(f"\nThe shuffle buffer takes {found['buffer_microseconds_per_row']:.2f} microseconds a row")
    save("harvest", {"width": WIDTH, **found}, args)

    def draw(axis: Any) -> None:
        labels = [f"{s['saes']} of {s['d_sae']}" for s in found["split"]]
        left = [0.0] * len(labels)
        for part in parts:
            shares = [s["share"][part] for s in found["split"]]
            axis.barh(labels, shares, left=left, label=part)
            left = [a + b for a, b in zip(left, shares, strict=True)]
        axis.set(xlabel="share of the time", ylabel="SAEs")
        axis.legend(fontsize=7)

    figure("harvest", args, draw)


if __name__ == "__main__":
    main()
