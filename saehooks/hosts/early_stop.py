"""Ending a forward pass early, without leaving anything behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import nn

from saehooks.hosts.hooks import Slot, hook_module
from saehooks.hosts.method_wrapper import replaced_method


class _Stop(BaseException):
    """Thrown at the site, caught at the entry point. Not an Exception, so that no model swallows it on the way."""

    def __init__(self, owner: _Stopper):
        super().__init__("a forward pass was stopped at a site")
        self.owner = owner


class _Calls(threading.local):
    """How many entry points are running in this thread, one inside the other."""

    running = 0


class _Stopper:
    """One stop: a hook that throws, and entry points that catch."""

    def __init__(self, module: nn.Module, slot: Slot):
        self._calls = _Calls()
        self._hook = hook_module(module, slot, self._fire)

    def _fire(self, *_: Any) -> None:
        # A submodule may be called by itself, with no entry point above it to catch: then it runs to its end.
        if self._calls.running:
            raise _Stop(self)

    def remove(self) -> None:
        self._hook.remove()

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def stopped_forward(*args: Any, **kwargs: Any) -> Any:
            if not self._calls.running:
                self._hook.move_to_end()  # hooks that came after the block was entered run too
            self._calls.running += 1
            try:
                return forward(*args, **kwargs)
            except _Stop as stop:
                if stop.owner is not self or self._calls.running > 1:
                    raise
                return None
            finally:
                self._calls.running -= 1

        return stopped_forward


@contextmanager
def stopping(module: nn.Module, slot: Slot, entry_points: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
    """End every call of an entry point right after the output (or input) of ``module`` has passed all its hooks.

    Args:
        module: where to stop.
        slot: ``"out"`` or ``"in"``.
        entry_points: (module, method name) pairs; the outermost one that is running returns None.
    """
    with ExitStack() as stack:
        stopper = _Stopper(module, slot)
        stack.callback(stopper.remove)
        for owner, name in entry_points:
            stack.enter_context(replaced_method(owner, name, stopper.around))
        yield
