"""The progress display of a training."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from saehooks.show.progress import started

COLUMNS = {"loss": ".4f", "nmse": ".4f", "l0": ".1f", "dead": ".0f", "lr": ".1e", "eval_nmse": ".4f", "eval_l0": ".1f"}
LINE_EVERY = 20.0
"""Seconds between lines where the output is no terminal."""


class Watched(Protocol):
    """What the display reads of a trainer."""

    steps: int
    expected_steps: int | None

    @property
    def rows_seen(self) -> int: ...

    def latest(self, name: str) -> float | None: ...


class TrainingProgress:
    """Shows step, loss, NMSE, L0, dead latents, tokens per second and time left, as a context manager.

    Args:
        trainers: what is shown, by name: a row each.
        enabled: True: always (plain lines where there is no terminal); False: never; None: in terminals and notebooks.
    """

    def __init__(
        self, trainers: Mapping[str, Watched], enabled: bool | None = None, console: Console | None = None
    ) -> None:
        self.trainers = trainers
        self.console = console or Console(file=sys.stderr) if not _in_notebook() else Console()
        self.live_display = self.console.is_terminal or self.console.is_jupyter
        self.enabled = self.live_display if enabled is None else enabled
        self._started, self._said = time.perf_counter(), 0.0
        self._rows = {name: trainer.rows_seen for name, trainer in trainers.items()}
        self._live: Live | None = None
        self._display = ExitStack()
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        self._task = self._bar.add_task("training", total=None)

    def __enter__(self) -> TrainingProgress:
        if self.enabled and self.live_display:
            live = Live(self.render(), console=self.console, refresh_per_second=4, transient=False)
            if self._display.enter_context(started(live)):
                self._live = live
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self.render())
            self._display.close()
        elif self.enabled:
            self._print()

    def update(self) -> None:
        """Show the trainer as it is now."""
        if not self.enabled:
            return
        if self._live is not None:
            self._live.update(self.render())
        elif time.perf_counter() - self._said > LINE_EVERY:
            self._said = time.perf_counter()
            self._print()

    def _print(self) -> None:
        for name in self.trainers:
            self.console.print(self.line(name), highlight=False)

    def rate(self, name: str) -> float:
        """Rows that a trainer took in per second since the display began."""
        return (self.trainers[name].rows_seen - self._rows[name]) / max(1e-9, time.perf_counter() - self._started)

    def line(self, name: str) -> str:
        """One line of text about one trainer."""
        trainer = self.trainers[name]
        total = f"/{trainer.expected_steps}" if trainer.expected_steps else ""
        found = [(column, trainer.latest(column), form) for column, form in COLUMNS.items()]
        values = "  ".join(f"{column} {value:{form}}" for column, value, form in found if value is not None)
        return f"{name}{': ' if name else ''}step {trainer.steps}{total}  {values}  {self.rate(name):,.0f} tokens/s"

    def render(self) -> Group:
        """A bar with a row of figures for each trainer under it."""
        trainers = self.trainers.values()
        totals = [trainer.expected_steps for trainer in trainers]
        total = sum(map(int, totals)) if all(totals) else None  # type: ignore[arg-type]
        self._bar.update(self._task, completed=sum(trainer.steps for trainer in trainers), total=total)
        columns = [one for one in COLUMNS if any(trainer.latest(one) is not None for trainer in trainers)]
        several = len(self.trainers) > 1
        table = Table(*[""] * several, box=None, pad_edge=False)
        for column in (*["step"] * several, *columns, "tokens/s"):
            table.add_column(column, justify="right")
        for name, trainer in self.trainers.items():
            values = [(trainer.latest(column), COLUMNS[column]) for column in columns]
            cells = ["" if value is None else f"{value:{form}}" for value, form in values]
            table.add_row(*[name, str(trainer.steps)] * several, *cells, f"{self.rate(name):,.0f}")
        return Group(self._bar, table)


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules
