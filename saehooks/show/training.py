"""The progress display of a training."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

COLUMNS = {"loss": ".4f", "nmse": ".4f", "l0": ".1f", "dead": ".0f", "lr": ".1e", "eval_nmse": ".4f", "eval_l0": ".1f"}
LINE_EVERY = 20.0
"""Seconds between lines where the output is no terminal."""


class Watched(Protocol):
    """What the display reads of a trainer."""

    steps: int
    rows_seen: int
    expected_steps: int | None

    def latest(self, name: str) -> float | None: ...


class TrainingProgress:
    """Shows step, loss, NMSE, L0, dead latents, tokens per second and time left, as a context manager.

    Args:
        trainer: what is shown.
        enabled: True: always (plain lines where there is no terminal); False: never; None: in terminals and notebooks.
    """

    def __init__(self, trainer: Watched, enabled: bool | None = None, console: Console | None = None) -> None:
        self.trainer = trainer
        self.console = console or Console(file=sys.stderr) if not _in_notebook() else Console()
        self.live_display = self.console.is_terminal or self.console.is_jupyter
        self.enabled = self.live_display if enabled is None else enabled
        self._started, self._rows, self._said = time.perf_counter(), trainer.rows_seen, 0.0
        self._live: Live | None = None
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        self._task = self._bar.add_task("training", total=trainer.expected_steps)

    def __enter__(self) -> TrainingProgress:
        if self.enabled and self.live_display:
            self._live = Live(self.render(), console=self.console, refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self.render())
            self._live.stop()
        elif self.enabled:
            self.console.print(self.line(), highlight=False)

    def update(self) -> None:
        """Show the trainer as it is now."""
        if not self.enabled:
            return
        if self._live is not None:
            self._live.update(self.render())
        elif time.perf_counter() - self._said > LINE_EVERY:
            self._said = time.perf_counter()
            self.console.print(self.line(), highlight=False)

    @property
    def rate(self) -> float:
        """Rows taken in per second since the display began."""
        return (self.trainer.rows_seen - self._rows) / max(1e-9, time.perf_counter() - self._started)

    def line(self) -> str:
        """One line of text."""
        total = f"/{self.trainer.expected_steps}" if self.trainer.expected_steps else ""
        found = [(name, self.trainer.latest(name), form) for name, form in COLUMNS.items()]
        values = "  ".join(f"{name} {value:{form}}" for name, value, form in found if value is not None)
        return f"step {self.trainer.steps}{total}  {values}  {self.rate:,.0f} tokens/s"

    def render(self) -> Group:
        """A bar with a row of figures under it."""
        self._bar.update(self._task, completed=self.trainer.steps, total=self.trainer.expected_steps)
        table = Table(box=None, pad_edge=False)
        cells = []
        for name, form in COLUMNS.items():
            value = self.trainer.latest(name)
            if value is not None:
                table.add_column(name, justify="right")
                cells.append(f"{value:{form}}")
        table.add_column("tokens/s", justify="right")
        table.add_row(*cells, f"{self.rate:,.0f}")
        return Group(self._bar, table)


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules
