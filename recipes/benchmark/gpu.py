"""The GPU kernels measured in one run: correct against float64 first, then ratios to what else could be done.

    make gpu-bench                                # on a GPU, with nothing but torch and Triton
    python recipes/benchmark/gpu.py --interpret   # the same code at toy size, without a GPU: it reports no times

Writes gpu.json, gpu.md and gpu_*.svg into the results folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TOPK = 64


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interpret", action="store_true", help="toy sizes in Triton's interpreter, without a GPU")
    parser.add_argument("--minutes", type=float, default=7.0, help="sizes not begun after this long are left out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table, JSON and pictures")
    args = parser.parse_args()
    args.d_sae = [64] if args.interpret else [49_152, 24_576, 3_072, 262_144]
    args.d_in = [16] if args.interpret else [768, 2_048]
    args.supports = [4] if args.interpret else [64, 16, 200]
    args.rows = 3 if args.interpret else 4_096
    args.out.mkdir(parents=True, exist_ok=True)
    return args


class Hollow(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Absent:
    """Finds hollow modules for packages that only rendering and files need, where they are not installed."""

    def __init__(self, *names: str) -> None:
        self.names = [name for name in names if not self._installed(name)]

    @staticmethod
    def _installed(name: str) -> bool:
        try:
            return bool(import_module(name))
        except ImportError:
            return False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Hollow(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def prepare(interpret: bool) -> torch.device:
    """Make saehooks importable on a bare machine, and choose the device."""
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("no GPU here; to run the same code at toy size without one: --interpret")
    sys.meta_path.insert(0, Absent("rich", "safetensors"))
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    return torch.device("cpu" if interpret else "cuda")


def main() -> None:
    args = arguments()
    device = prepare(args.interpret)
    from gpu_measure import attached, checked, decoded, scored, selected, stepped
    from gpu_report import Clock, machine

    from saehooks import kernels

    began = time.perf_counter()
    clock = Clock(device, args.interpret)
    found: dict[str, Any] = {"machine": machine(args.interpret), "rows": args.rows, "skipped": []}
    torch.manual_seed(0)
    with kernels.force("gpu") if args.interpret else nullcontext():
        found["exact"] = checked(args, clock)
        sections = {"select": selected, "encode": scored, "decode": decoded, "step": stepped}
        for name in sections:
            found[name] = []
        for d_in in args.d_in:
            for d_sae in args.d_sae:
                for name, section in sections.items():
                    if time.perf_counter() - began > 60 * args.minutes:
                        found["skipped"].append([name, d_in, d_sae])
                    elif name != "select" or d_in == args.d_in[0]:
                        found[name] += section(args, clock, d_in, d_sae)
        found["attach"] = attached(args, clock)
    found["minutes"] = (time.perf_counter() - began) / 60
    write(args, found)


def write(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Table to the terminal and, with JSON and pictures, to the results folder."""
    from gpu_report import bars, table

    parts = [f"# GPU benchmark\n\n`{json.dumps(found['machine'])}`\n\nRows {args.rows}; times are medians in ms."]
    if args.interpret:
        parts.append("Run in Triton's interpreter at toy size, to show that it runs: nothing was timed.")
    for name in ("exact", "select", "encode", "decode", "step", "attach"):
        rows = found[name]
        if rows:
            parts.append(f"## {name}\n\n" + table(list(rows[0]), [list(row.values()) for row in rows]))
    text = "\n\n".join(parts) + "\n"
    print(text)
    (args.out / "gpu.md").write_text(text)
    (args.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    for name in ("select", "step"):
        groups = {
            f"d_sae {row['d_sae']}, d_in {row['d_in']}, support {row['support']}": {
                key.removesuffix(" ms"): value for key, value in row.items() if key.endswith(" ms")
            }
            for row in found[name]
        }
        bars(args.out / f"gpu_{name}.svg", f"{name}: milliseconds, {args.rows} rows", groups)
    print(f"written: {args.out / 'gpu.md'}, gpu.json" + ("" if args.interpret else ", gpu_*.svg"))


if __name__ == "__main__":
    main()
