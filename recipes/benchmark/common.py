"""What the benchmarks share: the device and its clock, the cases, scores of a wanted support, results as JSON.

Every figure is a ratio to a matrix product of the same run: other programs, clocks and thread counts change both sides.
On CPU jobs take turns, round after round; on CUDA `triton.testing` times each, with the L2 cache flushed in between.
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
import sys
import threading
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("saehooks", "torch", "numba", "numpy", "entmax", "sae-lens", "eai-sparsify", "transformer-lens", "triton")

Job = Callable[[], Any]
Row = dict[str, Any]


class Case(NamedTuple):
    """One size of everything."""

    rows: int
    d_sae: int
    d_in: int = 576
    support: int = 64


class Bench:
    """One run: where it happens, how long jobs take there, and what is written.

    Args:
        args: of `arguments`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.toy = args.device == "interpret"
        self.device = torch.device("cuda" if args.device == "cuda" else "cpu")
        self.rows: dict[str, list[Row]] = {}
        """By section."""

    @property
    def timed(self) -> bool:
        """Whether times are measured: neither in Triton's interpreter, nor where jobs only run to be compiled."""
        return not (self.toy or self.args.compile)

    def cases(self, cpu: list[Case], cuda: list[Case]) -> list[Case]:
        """Those of this device: the first alone with --quick, a toy in the interpreter."""
        if self.toy:
            return [Case(3, 64, 16, 4)]
        chosen = cuda if self.device.type == "cuda" else cpu
        return chosen[:1] if self.args.quick else chosen

    # ------------------------------------------------------------------ times

    def time(self, jobs: dict[str, Job], base: str, before: Job | None = None, graph: bool = False) -> Row:
        """``{job: {"ms", "ratio", "low", "high"}}``: medians, and the ratio to the job named ``base`` with quartiles.

        Args:
            jobs: by name; one that raises, or runs out of memory, gets a note instead.
            base: the product that the others are compared with.
            before: on CPU run before each job, untimed, so that all find caches and threads alike.
            graph: on CUDA: capture each job as a graph, so that Python's time does not count.
        """
        jobs, notes = self._working(jobs)
        if not self.timed:
            return {name: {"ms": None, "ratio": None} for name in jobs} | notes
        if self.device.type == "cuda":
            times = {name: self._on_cuda(job, graph) for name, job in jobs.items()}
        else:
            times = self._in_turns(jobs, before)
        return {name: _summary(values, times[base]) for name, values in times.items()} | notes

    def _working(self, jobs: dict[str, Job]) -> tuple[dict[str, Job], Row]:
        """Jobs that run once without an error, and what the others said."""
        good, notes = {}, {}
        for name, job in jobs.items():
            try:
                job()
                good[name] = job
            except (ImportError, torch.OutOfMemoryError, RuntimeError) as error:
                notes[name] = {"note": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
        return good, notes

    def _on_cuda(self, job: Job, graph: bool) -> list[float]:
        from triton import testing

        if graph:
            return testing.do_bench_cudagraph(job, rep=100 if self.args.quick else 300, return_mode="all")
        return testing.do_bench(job, rep=100 if self.args.quick else 300, return_mode="all")

    def _in_turns(self, jobs: dict[str, Job], before: Job | None) -> dict[str, list[float]]:
        """Milliseconds of each job, round after round; a slow job is run at least three times."""
        clock = time.thread_time if self.args.clock == "cpu" else time.perf_counter
        times: dict[str, list[float]] = {name: [] for name in jobs}
        began = time.perf_counter()
        for _ in range(self.args.repeats):
            for name, job in jobs.items():
                if time.perf_counter() - began > 60 and len(times[name]) >= 3:
                    continue
                if before is not None:
                    before()
                started = clock()
                job()
                times[name].append(1e3 * (clock() - started))
        return times

    def peak_mb(self, job: Job) -> float | None:
        """Megabytes a job needs at its peak beyond what was there before it."""
        if not self.timed:
            return None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            job()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
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

    # ---------------------------------------------------------------- results

    def add(self, section: str, case: Case, times: Row, **more: Any) -> None:
        """Keep what was measured and print it: ratios, or what else a job has."""
        row: Row = {**case._asdict(), **more, "times": times}
        self.rows.setdefault(section, []).append(row)
        shown = {name: found.get("ratio", found.get("note")) for name, found in times.items()}
        print(f"{section}: {case.rows} x {case.d_sae} x {case.d_in}", {**more, **shown}, flush=True)

    def save(self, name: str) -> None:
        """Print a table of each section and write all of it, with the machine, to ``<name>.json``."""
        if self.args.compile:  # there is nothing to write
            return
        for section, rows in self.rows.items():
            print(f"\n{section}\n{as_table(rows)}")
        self.args.out.mkdir(parents=True, exist_ok=True)
        where = self.args.out / f"{name}.json"
        where.write_text(json.dumps({"machine": machine(self.args), "sections": self.rows}, indent=1) + "\n")
        print(f"\nwritten: {where}")


def _summary(values: list[float], base: list[float]) -> Row:
    """Ratios within a round where there are rounds; else of the medians."""
    paired = len(values) == len(base)
    ratios = [a / b for a, b in zip(values, base, strict=False)] if paired else [statistics.median(values)]
    scale = 1.0 if paired else statistics.median(base)
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"ms": statistics.median(values), "ratio": middle / scale, "low": low / scale, "high": high / scale}


def as_table(rows: list[Row]) -> str:
    """Ratios of every job as a Markdown table, one row a case."""
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    keys = [key for key in rows[0] if key != "times"]
    lines = [[*keys, *names]]
    for row in rows:
        found = [row["times"].get(name, {}) for name in names]
        cells = [_short(row.get(key)) for key in keys]
        lines.append(cells + [_short(one.get("ratio", one.get("note"))) for one in found])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _short(cell: Any) -> str:
    if not isinstance(cell, float):
        return "" if cell is None else str(cell)
    return f"{cell:.3f}" if abs(cell) < 1 else f"{cell:.2f}" if abs(cell) < 100 else f"{cell:.0f}"


# ---------------------------------------------------------------------- arguments


def arguments(description: str, add: Callable[[argparse.ArgumentParser], None] | None = None) -> argparse.Namespace:
    """What every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cpu", "cuda", "interpret"), default="cpu", help="interpret: no times")
    parser.add_argument("--quick", action="store_true", help="one case of each")
    parser.add_argument("--repeats", type=int, default=9, help="rounds on CPU")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: this thread's own time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON")
    parser.add_argument("--compile", action="store_true", help="run each job once, so that its kernels are compiled")
    if add is not None:
        add(parser)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here; --device interpret runs the same code at toy size, and times nothing")
    if args.device == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"
        from saehooks.kernels import backend

        backend.FORCED = "gpu"
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.clock == "cpu" and torch.get_num_threads() != 1:
        parser.error("--clock cpu counts one thread only: add --threads 1")
    torch.manual_seed(0)
    return args


def machine(args: argparse.Namespace) -> Row:
    """Versions and hardware, without names of hosts or people."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    found: Row = {
        "python": platform.python_version(), "system": platform.system(), "processor": _processor(),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "clock": args.clock, "device": args.device,
        "versions": versions,
    }  # fmt: skip
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
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return " ".join([named, *(flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags)])


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


# --------------------------------------------------------------------------- data


def queries_and_keys(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random queries and unit keys, the queries scaled so that sparsemax selects about ``support`` latents."""
    from saehooks import kernels

    made = torch.Generator().manual_seed(0)
    queries = torch.randn(case.rows, case.d_in, generator=made).to(device)
    keys = nn.functional.normalize(torch.randn(case.d_sae, case.d_in, generator=made), dim=1).to(device)
    low, high = 1e-2, 1e2
    sample = queries[:64]
    for _ in range(3 if case.rows < 8 else 14):
        scale = (low * high) ** 0.5
        size = kernels.select(sample * scale, keys, kernels.Sparsemax()).indices.numel() / len(sample)
        low, high = (scale, high) if size > case.support else (low, scale)
    return queries * scale, keys


def concept_sae(case: Case, x: Tensor) -> tuple[Any, float]:
    """A concept SAE, its keys scaled so that it selects about ``support`` latents of x (rows, d_in), and the scale."""
    from saehooks import SAE

    sae = SAE(case.d_in, case.d_sae).to(x.device)
    low, high = 0.05, 50.0
    with torch.no_grad():
        for _ in range(3 if len(x) < 8 else 12):
            scale = (low * high) ** 0.5
            sae.dictionary.W_k.copy_(torch.eye(case.d_in) * scale)
            size = float(sae.encode(x[:64]).support_size.double().mean())
            low, high = (scale, high) if size > case.support else (low, scale)
    return sae, scale


def dense_products(queries: Tensor, keys: Tensor) -> dict[str, Job]:
    """The exact float32 products that the others are compared with: the vendor's ways of ``queries @ keys.T``."""
    out = queries.new_empty(queries.shape[0], keys.shape[0])
    jobs: dict[str, Job] = {"torch.mm": lambda: torch.mm(queries, keys.T, out=out)}
    if queries.device.type == "cpu" and torch.backends.mkldnn.is_available():
        jobs["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(queries, keys, None, "none", [], "")
    return jobs


def per_fastest(times: Row, products: Iterable[str]) -> Row:
    """The same times, their ratios to the fastest of the products, which becomes the row "fastest product"."""
    known = {name: times[name]["ms"] for name in products if times.get(name, {}).get("ms")}
    if not known:
        return times
    best = min(known, key=known.get)  # type: ignore[arg-type]
    factor = times[best]["ratio"]
    scaled = {
        name: {key: value / factor if key in ("ratio", "low", "high") else value for key, value in found.items()}
        for name, found in times.items()
    }
    return scaled | {"fastest product": {"ms": times[best]["ms"], "note": best}}
