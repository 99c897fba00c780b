"""Every benchmark of a device, one process each, and what was asked for beside what was measured.

    python recipes/benchmark/run.py --device cuda --minutes 8      # or: make gpu-bench
    python recipes/benchmark/run.py --device interpret --out /tmp  # the same code without a GPU: it times nothing

On a GPU all scripts first run at once and untimed, a process each: compiling kernels takes longer than running
them. What there is no time for is left out, with a line. JSON goes to ``--out``, by default results/<device>.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
SCRIPTS = ("selection", "encode", "train_step", "attach", "sweep", "harvest")


class Goal(NamedTuple):
    """A limit on a ratio: of a job to another, in one section, for cases of some size."""

    device: str
    what: str
    section: str
    job: str
    limit: float
    over: str = ""
    """The job it is compared with; none: the product."""
    least: int = 0
    """Latents from which on it is asked for."""


GOALS = (
    Goal("cpu", "encode, products", "encode", "sparsemax", 0.65, least=24576),
    Goal("cpu", "forward and backward, products", "train step", "sparsemax, concepts", 1.0, least=24576),
    Goal("cpu", "selection, products", "selection", "saehooks sparsemax", 0.05, least=24576),
    Goal("cpu", "selection / torch.topk", "selection", "saehooks sparsemax", 0.4, "torch.topk", 24576),
    Goal("cuda", "selection / torch.topk", "selection", "saehooks sparsemax", 0.35, "torch.topk"),
    Goal("cuda", "selection / amax", "selection", "saehooks sparsemax", 1.3, "amax"),
    Goal("cuda", "encode / bfloat16 product", "encode", "sparsemax", 1.15, "bfloat16 product"),
    Goal("cuda", "forward and backward, products", "train step", "sparsemax, concepts", 2.5, least=49152),
)


def judged(sections: dict[str, list[dict[str, Any]]], device: str) -> list[str]:
    """A line a goal and case: met or not."""
    lines = []
    for goal in GOALS:
        for row in sections.get(goal.section, []) if goal.device == device else []:
            mine, base = row["times"].get(goal.job, {}), row["times"].get(goal.over, {"ratio": 1.0})
            if row["d_sae"] < goal.least or not mine.get("ratio") or not base.get("ratio"):
                continue
            value = mine["ratio"] / base["ratio"]
            verdict = "met" if value <= goal.limit else "NOT MET"
            size = f"{row['rows']} x {row['d_sae']} x {row['d_in']}, support {row['support']}"
            lines.append(f"{goal.what}, {size}: {value:.3f}, wanted {goal.limit:g}: {verdict}")
    return lines


def compile_kernels(device: str, options: list[str], seconds: float) -> list[str]:
    """Run every script once beside the others, in processes of their own, which fill the kernels' cache on disk; those
    that fail, or take longer, compile what is missing when they are timed. Returns the scripts that did not finish."""
    names = [name for name in SCRIPTS if name != "harvest"]  # whose kernels are those of a training step
    commands = {name: [sys.executable, str(HERE / f"{name}.py"), "--device", device, "--compile"] for name in names}
    ended = time.monotonic() + seconds

    def finished(command: list[str]) -> bool:
        try:
            return not subprocess.run([*command, *options], timeout=max(0.0, ended - time.monotonic())).returncode
        except subprocess.TimeoutExpired:
            return False

    with ThreadPoolExecutor() as pool:
        done = dict(zip(commands, pool.map(finished, commands.values()), strict=True))
    return [name for name, whole in done.items() if not whole]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda", "interpret"), default="cpu")
    parser.add_argument("--minutes", type=float, default=60, help="scripts not begun after this long are left out")
    parser.add_argument("--out", type=Path, help="folder for JSON")
    args, passed_on = parser.parse_known_args()
    out = args.out or HERE / "results" / args.device
    began, failed, sections = time.monotonic(), [], {}
    if args.device == "cuda" and args.minutes > 0:
        missing = compile_kernels(args.device, passed_on, 20 * args.minutes)
        print(
            f"compiled in {time.monotonic() - began:.0f} s; not to the end: {', '.join(missing) or 'none'}", flush=True
        )
    for name in SCRIPTS:
        left = 60 * args.minutes - (time.monotonic() - began)
        if (name == "sweep" and args.device == "cpu") or (name == "harvest" and args.device == "interpret"):
            continue
        if left <= 0:
            print(f"{name}: left out, no time left")
            continue
        command = [sys.executable, str(HERE / f"{name}.py"), "--device", args.device, "--out", str(out), *passed_on]
        try:
            if subprocess.run(command, timeout=left + 60).returncode:
                failed.append(name)
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped, no time left")
        if (out / f"{name}.json").exists():
            sections |= json.loads((out / f"{name}.json").read_text())["sections"]
    print("\n".join(["", "Goals:", *(judged(sections, args.device) or ["nothing was timed"])]))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
