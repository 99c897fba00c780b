"""The GPU kernels measured in one run: correct against float64 first, then ratios to what else could be done.

    make gpu-bench                                # on a GPU, with nothing but torch and Triton
    python recipes/benchmark/gpu.py --interpret   # the same code at toy size, without a GPU: it reports no times

Needs saehooks/ and recipes/benchmark/ alone. Writes gpu.md (goals first), gpu.json and gpu_*.svg into the results
folder, again after every task: a run that is stopped leaves what it has measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import bare  # noqa: F401  (makes saehooks importable)
import torch

RESULTS = Path(__file__).parent / "results"


class Task(NamedTuple):
    """A piece of the run that begins only while there is time."""

    name: str
    run: Callable[[], dict[str, list[dict[str, Any]]]]
    """Gives rows by section."""
    budget: float = 0.15
    """Seconds for the repeats of one job."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interpret", action="store_true", help="toy sizes in Triton's interpreter, without a GPU")
    parser.add_argument("--minutes", type=float, default=7.0, help="tasks not begun after this long are left out")
    parser.add_argument("--memory-gb", type=float, help="leave out what needs more (default: what is free)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table, JSON and pictures")
    args = parser.parse_args()
    if args.interpret:
        args.rows, args.supports, args.sizes, args.later = 3, [4], [(16, 64)], []
    else:
        args.rows, args.supports = 4_096, [64, 16, 200]
        args.sizes = [(768, 49_152), (768, 24_576), (768, 3_072)]
        args.later = [(2_048, 49_152), (768, 262_144), (2_048, 24_576), (2_048, 3_072), (2_048, 262_144)]
    args.reference = args.sizes[0]
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def device_of(interpret: bool) -> torch.device:
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("no GPU here; to run the same code at toy size without one: --interpret")
    return torch.device("cpu" if interpret else "cuda")


def tasks(args: argparse.Namespace, clock: Any, found: dict[str, Any]) -> list[Task]:
    """All that is measured, what the goals speak of first."""
    from gpu_attach import attached
    from gpu_exact import checked
    from gpu_measure import decoded, scored, selected
    from gpu_profile import accounted, peaks, profiled
    from gpu_step import stepped, trained
    from gpu_sweep import swept

    def at(section: Callable[..., Any], d_in: int, d_sae: int, budget: float | None = None) -> Task:
        budget = budget or (0.3 if (d_in, d_sae) == args.reference else 0.15)
        name = f"{section.__name__}, {d_sae:,} latents x {d_in:,}"
        return Task(name, lambda: section(args, clock, d_in, d_sae), budget)

    def size(d_in: int, d_sae: int) -> list[Task]:
        given = [selected] if d_in == args.reference[0] else []  # scores are scores, whatever the width
        return [at(section, d_in, d_sae) for section in (*given, scored, decoded, stepped)]

    def profile() -> Any:
        return profiled(args, clock, *args.reference, found["peaks"][0])

    first, *small = args.sizes
    swept_sizes = {first: None, args.sizes[-1]: None}
    return [
        Task("exactness", lambda: checked(args, clock)),
        Task("peaks", lambda: peaks(args, clock)),
        *size(*first),
        Task("profile", profile),
        at(trained, *first),
        *(task for each in small for task in size(*each)),
        Task("attaching and generating", lambda: attached(args, clock)),
        *(at(swept, *each, budget=0.06) for each in swept_sizes),
        at(accounted, *first),
        *(task for each in args.later for task in size(*each)),
    ]


def main() -> None:
    args = arguments()
    device = device_of(args.interpret)
    from gpu_clock import Broken, Clock
    from gpu_report import machine, pictures, table

    from saehooks import kernels

    clock = Clock(device, args.interpret, args.minutes, args.memory_gb)
    reference = {"d_sae": args.reference[1], "d_in": args.reference[0], "support": args.supports[0]}
    found: dict[str, Any] = {"machine": machine(args.interpret), "rows": args.rows, "reference": reference}
    found |= {"skipped": clock.skipped, "failed": clock.failed, "uncaptured": clock.uncaptured}
    torch.manual_seed(0)
    gc.freeze()  # each capture of a CUDA graph collects garbage: not what the imports made
    try:
        with kernels.force("gpu") if args.interpret else nullcontext():
            for task in tasks(args, clock, found):
                if clock.late:
                    clock.skip(task.name, "no time left")
                    continue
                print(f"{clock.elapsed:5.2f} min  {task.name}", flush=True)
                clock.budget = task.budget
                for section, rows in (clock.tried(task.name, task.run) or {}).items():
                    found.setdefault(section, []).extend(rows)
                clock.tidy()
                write(args, clock, found)
    except Broken as error:
        clock.fail("the device", f"{error}; nothing after it was measured")
    print(f"\n{write(args, clock, found)}\n{table(found['goals'])}\n")
    pictures(found, args.out)
    print(f"written: {args.out / 'gpu.md'}, gpu.json" + ("" if args.interpret else ", gpu_*.svg"))
    sys.exit(bool(clock.failed))


def write(args: argparse.Namespace, clock: Any, found: dict[str, Any]) -> str:
    """The report, written to the results folder as Markdown and as JSON."""
    from gpu_goals import explained, judged
    from gpu_report import page
    from gpu_sweep import advice

    found |= {"minutes": clock.elapsed, "goals": judged(found)}
    text = page(found, found["goals"], explained(found), advice(found))
    (args.out / "gpu.md").write_text(text)
    (args.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    return text


if __name__ == "__main__":
    main()
