"""Timing, tables and pictures of the GPU benchmark; needs nothing but torch."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Job = Callable[[], Any]


class Clock:
    """Medians of jobs on one device. In the interpreter every job runs once and no time is reported."""

    def __init__(self, device: torch.device, interpreted: bool) -> None:
        self.device, self.interpreted = device, interpreted

    def ms(self, job: Job, budget: float = 0.35) -> float | None:
        """Median milliseconds by device events, over as many runs as fit the budget of seconds; at least 5."""
        if self.interpreted:
            job()
            return None
        started = time.perf_counter()
        job()
        job()
        torch.cuda.synchronize()
        once = (time.perf_counter() - started) / 2
        runs = max(5, min(100, int(budget / max(once, 1e-5))))
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
        for begin, end in marks:
            begin.record()
            job()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in marks)

    def peak_mb(self, job: Job) -> float | None:
        """Megabytes beyond what was allocated before, at the job's peak."""
        if self.interpreted:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def tried(name: str, job: Callable[[], Any]) -> Any:
    """The job's result; where the GPU's memory does not suffice, None, and a line that says so."""
    try:
        return job()
    except torch.OutOfMemoryError:
        print(f"  {name}: out of memory", flush=True)
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def graphed(job: Job, clock: Clock) -> Job:
    """The job as a CUDA graph; as it is in the interpreter."""
    if clock.interpreted:
        return job
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            job()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()
    return graph.replay


def machine(interpreted: bool) -> dict[str, Any]:
    """Versions and hardware, without names of hosts or people."""
    versions = {}
    for name in ("torch", "triton", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    found: dict[str, Any] = {"python": platform.python_version(), "versions": versions, "interpreted": interpreted}
    if not interpreted:
        found["gpu"] = torch.cuda.get_device_name()
        found["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9)
        found["cuda"] = torch.version.cuda
    return found


def ratio(mine: float | None, other: float | None) -> float | None:
    """mine / other where both were measured."""
    return None if mine is None or other is None else mine / other


def table(header: list[str], rows: Iterable[list[Any]]) -> str:
    """A Markdown table; what was not measured is a dash."""
    lines = [header, *([_short(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    shown = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([shown[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *shown[1:]])


def _short(cell: Any) -> str:
    if cell is None:
        return "-"
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.1e}" if 0 < abs(cell) < 1e-3 else f"{cell:.3f}" if abs(cell) < 10 else f"{cell:.0f}"


def bars(where: Path, title: str, groups: dict[str, dict[str, float | None]]) -> None:
    """Horizontal bars as SVG: groups of named values, the scale shared. Nothing measured, nothing drawn."""
    values = [value for group in groups.values() for value in group.values() if value is not None]
    if not values:
        return
    most, y, parts = max(values), 34, []
    for group, named in groups.items():
        parts.append(f'<text x="8" y="{y + 4}" font-weight="bold">{group}</text>')
        y += 18
        for name, value in named.items():
            if value is None:
                continue
            colour = "#b8442c" if name.startswith("saehooks") else "#8a93a0"
            parts.append(f'<text x="16" y="{y + 4}">{name}</text>')
            parts.append(f'<rect x="250" y="{y - 7}" width="{360 * value / most:.1f}" height="12" fill="{colour}"/>')
            parts.append(f'<text x="{256 + 360 * value / most:.1f}" y="{y + 4}">{_short(value)}</text>')
            y += 17
        y += 8
    where.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="700" height="{y}" font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/><text x="8" y="16" font-size="13">{title}</text>'
        + "".join(parts)
        + "</svg>\n"
    )
