"""What the benchmarks share: interleaved timing, peak memory, scores of a wanted support, results as JSON and pictures.

Every figure is a ratio to a matrix product of the same run: other programs, clocks and thread counts change both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_clock import device_peak_mb
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("saehooks", "torch", "numba", "numpy", "entmax", "sae-lens", "transformer-lens", "triton")


def arguments(description: str, add: Callable[[argparse.ArgumentParser], None] | None = None) -> argparse.Namespace:
    """What every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="one small case of each, within two minutes")
    parser.add_argument("--repeats", type=int, default=0, help="timings of each (default: 7, quick: 3)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's)")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu counts this thread's own time, for busy machines; only with --threads 1",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and pictures")
    if add is not None:
        add(parser)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.clock == "cpu" and torch.get_num_threads() != 1:
        parser.error("--clock cpu counts one thread only: add --threads 1")
    args.repeats = args.repeats or (3 if args.quick else 7)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Versions and hardware, without names of hosts or people."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": args.clock,
        "versions": versions,
    }
    if hasattr(os, "getloadavg"):
        found["load_average"] = round(os.getloadavg()[0], 2)
    if args.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


# ------------------------------------------------------------------- timing


def interleaved(
    jobs: dict[str, Callable[[], Any]],
    args: argparse.Namespace,
    budget: float = 60.0,
    before: Callable[[], Any] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each job, ``args.repeats`` rounds of all in turn after one that is not counted.

    ``before`` is run, untimed, before each job, so that all find caches and threads alike. Slow jobs are run fewer
    times: at least twice, so that one of them never takes the whole ``budget`` of seconds.
    """
    clock = time.thread_time if args.clock == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in jobs}
    spent = dict.fromkeys(jobs, 0.0)
    for turn in range(args.repeats + 1):
        for name, job in jobs.items():
            if turn > 2 and spent[name] > budget / len(jobs):
                continue
            if before is not None:
                before()
            if args.device == "cuda":
                torch.cuda.synchronize()
            began, started = time.perf_counter(), clock()
            job()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(clock() - started)
            spent[name] += time.perf_counter() - began
    return times


def summary(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Median seconds, quartiles, and the median of the ratios to ``base`` round by round."""
    out = {}
    for name, values in times.items():
        ratios = [value / other for value, other in zip(values, times[base], strict=False)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        out[name] = {
            "seconds": statistics.median(values),
            "fastest": min(values),
            "ratio": statistics.median(ratios),
            "ratio_low": low,
            "ratio_high": high,
            "ratio_of_fastest": min(values) / min(times[base]),
            "runs": len(values),
        }
    return out


def peak_memory(job: Callable[[], Any], device: str = "cpu") -> float:
    """Megabytes a job needs at its peak beyond what was there before it."""
    if device == "cuda":
        return device_peak_mb(job)
    _give_back()
    before, most, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        job()
    finally:
        most = max(most, _resident())
        done.set()
        watcher.join()
    return max(0, most - before) / 2**20


def _give_back() -> None:
    """Return freed memory to the system, and forget buffers, so that a job cannot use what another left."""
    from saehooks.kernels import memory

    gc.collect()
    memory.release()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


# --------------------------------------------------------------------- data


def queries_and_keys(rows: int, d_sae: int, width: int, support: float, device: str) -> tuple[Tensor, Tensor]:
    """Random queries and unit keys, the queries scaled so that sparsemax selects about ``support`` latents."""
    from saehooks import kernels

    made = torch.Generator().manual_seed(0)
    queries = torch.randn(rows, width, generator=made).to(device)
    keys = torch.nn.functional.normalize(torch.randn(d_sae, width, generator=made), dim=1).to(device)
    low, high = 1e-2, 1e2
    sample = queries[:64]
    for _ in range(14):
        scale = (low * high) ** 0.5
        size = kernels.select(sample * scale, keys, kernels.Sparsemax()).indices.numel() / len(sample)
        low, high = (scale, high) if size > support else (low, scale)
    return queries * scale, keys


class Decoder(nn.Module):
    """A language model of the size of SmolLM2's smallest, with random weights, so that nothing needs fetching."""

    def __init__(self, width: int = 576, layers: int = 12, vocabulary: int = 8192) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 9, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.unembed = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.unembed(x)


# ------------------------------------------------------------------- output


def table(rows: Iterable[Iterable[Any]], header: Iterable[str]) -> str:
    """A Markdown table."""
    lines = [list(map(str, header)), *([_short(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:]])


def _short(cell: Any) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.3f}" if abs(cell) < 1 else f"{cell:.2f}" if abs(cell) < 100 else f"{cell:.0f}"


def save(name: str, found: dict[str, Any], args: argparse.Namespace) -> Path:
    """Write ``<name>.json``, with the machine, into the results folder."""
    suffix = "_quick" if args.quick else ""
    where = args.out / f"{name}{suffix}.json"
    where.write_text(json.dumps({"machine": machine(args), **found}, indent=1) + "\n")
    print(f"\nwritten: {where}")
    return where


def figure(name: str, args: argparse.Namespace, draw: Callable[[Any], None], panels: int = 1) -> None:
    """Draw into ``<name>.png`` of the results folder; ``draw`` gets the axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 3.8))
    draw(axes)
    made.tight_layout()
    suffix = "_quick" if args.quick else ""
    made.savefig(args.out / f"{name}{suffix}.png", dpi=120)
    plt.close(made)
