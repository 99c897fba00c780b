"""The clock of the GPU benchmark: device time, host time, waits and memory; and what happens when a job cannot run.

Needs nothing but torch. In Triton's interpreter every job runs once and nothing is timed.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

Job = Callable[[], Any]

GRACE = 0.7
"""Minutes that a task which has begun may go on when the clock is late."""


class Broken(RuntimeError):
    """The device answers no more: nothing after this can be measured."""


class HostTime(NamedTuple):
    """Milliseconds of the host, medians."""

    returned: float | None
    """Until the call came back."""
    done: float | None
    """Until the device had finished."""


class Clock:
    """Medians of jobs on one device. What cannot run leaves None and a line behind; the rest goes on.

    Args:
        device: where the jobs run.
        interpreted: run each job once and time nothing.
        minutes: after so many the clock is `late`: no task should begin, and jobs get few repeats.
        memory_gb: jobs that need more are left out; None for what is free.
    """

    def __init__(
        self, device: torch.device, interpreted: bool, minutes: float = 7.0, memory_gb: float | None = None
    ) -> None:
        self.device, self.interpreted, self.memory_gb = device, interpreted, memory_gb
        self.began = time.perf_counter()
        self.minutes = minutes
        self.budget = 0.3
        """Seconds for the repeats of one job."""
        self.skipped: list[str] = []
        """What was left out, and why."""
        self.failed: list[str] = []
        """What raised an error, or was wrong."""
        self.uncaptured: list[str] = []
        """What could not be captured as a CUDA graph, and was launched from Python."""
        self._capture_failed = False

    @property
    def elapsed(self) -> float:
        """Minutes since the run began."""
        return (time.perf_counter() - self.began) / 60

    @property
    def late(self) -> bool:
        return self.elapsed > self.minutes

    def skip(self, name: str, why: str) -> None:
        """Leave something out, with a line in the report."""
        self.skipped.append(f"{name}: {why}")
        print(f"  left out: {self.skipped[-1]}", flush=True)

    def fail(self, name: str, what: str) -> None:
        """Record that something of ours went wrong."""
        self.failed.append(f"{name}: {what}")
        print(f"  FAILED: {self.failed[-1]}", flush=True)

    def tried(self, name: str, job: Job, gigabytes: float = 0.0, theirs: bool = False) -> Any:
        """The job's result; None where there is neither time nor memory for it, or it fails.

        Args:
            name: for the line that says so.
            job: what to run.
            gigabytes: memory that it needs, as far as is known.
            theirs: an error is no failure of ours, and counts as left out.
        Raises:
            Broken: the device reports an error that no later job survives.
        """
        if self.elapsed > self.minutes + GRACE:
            self.skip(name, "no time left")
            return None
        free = self.free_gb()
        if gigabytes > free:
            self.skip(name, f"needs about {gigabytes:.3g} GB, {free:.3g} GB are free")
            return None
        try:
            return job()
        except Broken:
            raise
        except torch.OutOfMemoryError:
            self.skip(name, "out of memory")
        except Exception as error:
            said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
            # OutOfResources is Triton's: the launch shape does not fit this GPU.
            if theirs or type(error).__name__ == "OutOfResources":
                self.skip(name, said)
            else:
                self.fail(name, said)
            if "CUDA error" in str(error):
                raise Broken(f"{name}: {said}") from error
        self.tidy()
        return None

    def tidy(self) -> None:
        """Give memory that nothing refers to back to the device."""
        gc.collect()
        if self.device.type == "cuda" and not self._capture_failed:
            torch.cuda.empty_cache()

    def free_gb(self) -> float:
        """Gigabytes (10**9 bytes) that a job may take."""
        if self.memory_gb is not None:
            return self.memory_gb
        if self.device.type != "cuda":
            return float("inf")
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return (torch.cuda.mem_get_info()[0] + kept) / 1e9

    # ------------------------------------------------------------------ time

    def ms(self, job: Job) -> float | None:
        """Median milliseconds between device events around the job, launched from Python; at least 5 runs."""
        if self.interpreted:
            job()
            return None
        runs = self._runs(job)
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
        for begin, end in marks:
            begin.record()
            job()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in marks)

    def graph_ms(self, name: str, job: Job) -> float | None:
        """`ms` of the job as a CUDA graph, so that it is the device's time and not Python's."""
        return self.ms(self.graphed(name, job))

    def host_ms(self, job: Job) -> HostTime:
        """Time on the host until the call returns, and until the device is done with it."""
        if self.interpreted:
            job()
            return HostTime(None, None)
        returned, done = [], []
        for _ in range(self._runs(job)):
            started = time.perf_counter()
            job()
            returned.append(time.perf_counter() - started)
            torch.cuda.synchronize()
            done.append(time.perf_counter() - started)
        return HostTime(1e3 * statistics.median(returned), 1e3 * statistics.median(done))

    def _runs(self, job: Job) -> int:
        """How often a job is repeated; it has run twice then, so that all is compiled."""
        job()
        torch.cuda.synchronize()
        started = time.perf_counter()
        job()
        torch.cuda.synchronize()
        once = time.perf_counter() - started
        return max(5, min(100, int((0.02 if self.late else self.budget) / max(once, 1e-6))))

    def graphed(self, name: str, job: Job) -> Job:
        """The job as a CUDA graph; the job itself in the interpreter, and where it cannot be captured."""
        if self.interpreted:
            return job
        before, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(before)
        with torch.cuda.stream(side):
            for _ in range(3):
                job()
        before.wait_stream(side)
        why = "an earlier capture failed" if self._capture_failed else self._why_not(job)
        if why is None:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    job()
                return graph.replay
            except Exception as error:
                # Torch before 2.12 counts it as underway for ever: no other capture, no emptying of its cache.
                self._capture_failed = True
                torch.cuda.set_stream(before)
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                why = f"{type(error).__name__}: {error}"[:300]
        self.uncaptured.append(f"{name}: {why}")
        print(f"  no CUDA graph: {self.uncaptured[-1]}", flush=True)
        return job

    def _why_not(self, job: Job) -> str | None:
        """Why a job cannot be captured: it waits for the device. None if it does not."""
        with _sync_debug("error"):
            try:
                job()
            except RuntimeError as error:
                if "synchronizing" not in str(error):
                    raise
                return "it waits for the device"
        return None

    # --------------------------------------------------------- waits and memory

    def waits(self, job: Job, runs: int = 1) -> tuple[float | None, str]:
        """How often one run makes the host wait for the device, and the lines of Python that do."""
        if self.interpreted:
            return None, ""
        job()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as heard, _sync_debug("warn"):
            warnings.simplefilter("always")
            for _ in range(runs):
                job()
        waits = [one for one in heard if "called a synchronizing" in str(one.message)]
        lines = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in waits)
        return len(waits) / runs, ", ".join(f"{line} x{count}" for line, count in lines.most_common(6))

    def peak_mb(self, job: Job) -> float | None:
        """Megabytes (2**20 bytes) beyond what was allocated before, at the job's peak."""
        return None if self.interpreted else device_peak_mb(job)


def device_peak_mb(job: Job) -> float:
    """Megabytes (2**20 bytes) of the GPU beyond what was allocated before, at the job's peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@contextmanager
def _sync_debug(mode: str) -> Iterator[None]:
    """Torch says, or refuses, what makes the host wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode(mode)
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def half_products() -> Iterator[None]:
    """Products of float32 matrices in half precision with float32 sums inside the block, on all sides."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
