"""Live displays: a progress bar, and a panel around something that changes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # rich is imported where something is shown
    from rich.panel import Panel
    from rich.progress import Progress

SECONDS_BETWEEN = 0.2
"""How often a panel is drawn again, at most."""


class Bar:
    """One line of progress, or nothing."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress, self._task = progress, None

    def start(self, what: str, total: int) -> None:
        """Begin a part of the work, of ``total`` steps."""
        if self._progress is not None:
            self._task = self._progress.add_task(what, total=total)  # type: ignore[assignment]

    def step(self, n: int = 1) -> None:
        """Advance by n steps."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, n)


@contextmanager
def bar(enabled: bool | None = None) -> Iterator[Bar]:
    """A bar on standard error.

    Args:
        enabled: by default only in a terminal.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(file=sys.stderr)
    if not (console.is_terminal if enabled is None else enabled):
        yield Bar()
        return
    columns: tuple[Any, ...] = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
    with started(progress) as running:
        yield Bar(progress if running else None)


@contextmanager
def panel(content: Any, title: Callable[[], str], enabled: bool | None = None) -> Iterator[Callable[[], None]]:
    """A panel on standard output that follows something that changes; gives the function that draws it again.

    Args:
        content: anything that rich can show.
        title: above it, as it is at the moment.
        enabled: by default only in an interactive terminal.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.panel import Panel

    console = Console()
    if not (enabled or (enabled is None and console.is_interactive and not console.is_jupyter)):
        yield lambda: None
        return

    def framed() -> Panel:
        return Panel(content, title=title(), expand=False)

    display, drawn = Live(framed(), console=console, auto_refresh=False), [0.0]

    def draw() -> None:
        if running and time.monotonic() - drawn[0] > SECONDS_BETWEEN:
            display.update(framed(), refresh=True)
            drawn[0] = time.monotonic()

    with started(display) as running:
        try:
            yield draw
        finally:
            if running:
                display.update(framed(), refresh=True)


@contextmanager
def started(display: Any) -> Iterator[bool]:
    """Run a display of rich inside the block; gives False, and leaves it out, where another one is running."""
    from rich.errors import LiveError

    try:
        display.start()
    except LiveError:
        yield False
        return
    try:
        yield True
    finally:
        display.stop()
