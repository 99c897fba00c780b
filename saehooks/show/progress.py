"""A progress bar for loops over batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """One line of progress, or nothing."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress, self._task = progress, None

    def start(self, what: str, total: int) -> None:
        """Begin a part of the work, of ``total`` steps."""
        if self._progress is not None:
            self._task = self._progress.add_task(what, total=total)  # type: ignore[assignment]

    def step(self, n: int = 1) -> None:
        """So many steps are done."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, n)


@contextmanager
def bar(enabled: bool | None = None) -> Iterator[Bar]:
    """A bar on standard error.

    Args:
        enabled: by default only in a terminal.
    """
    console = Console(file=sys.stderr)
    if not (console.is_terminal if enabled is None else enabled):
        yield Bar()
        return
    columns: tuple[Any, ...] = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
    try:
        progress.start()
    except LiveError:  # another live display is running: leave it alone
        yield Bar()
        return
    try:
        yield Bar(progress)
    finally:
        progress.stop()
