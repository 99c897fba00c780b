"""Interruptions that wait until nothing is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

UNTOUCHED = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""Handlers that may be replaced: a program that has handlers of its own keeps them."""


class Interruptions:
    """Ctrl-C and SIGTERM as KeyboardInterrupt, the first of them held back while something must not be left half done.

    Handlers exist inside the ``with`` block only, and only in the main thread, where Python runs them.

    Args:
        wanted: False: leave the signals alone.

    >>> with Interruptions() as interruptions:
    ...     with interruptions.held():
    ...         interruptions.check()  # raises where one has come; the end of the block does too
    """

    def __init__(self, wanted: bool = True) -> None:
        self.wanted = wanted and threading.current_thread() is threading.main_thread()
        self.count = 0
        """How many have come: from the second one on, they raise wherever they come."""
        self._holding = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interruptions:
        try:
            for number, untouched in UNTOUCHED.items():
                if self.wanted and signal.getsignal(number) == untouched:
                    self._before[number] = untouched
                    signal.signal(number, self._take)
        except BaseException:  # one that came right now
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the first interruption waits for `check` or for the end of the block."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        self.check()

    def check(self) -> None:
        """Raise KeyboardInterrupt if an interruption has come."""
        if self.count:
            raise KeyboardInterrupt

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1 or not self._holding:
            raise KeyboardInterrupt
