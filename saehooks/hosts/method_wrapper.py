"""Standing in for one method of one module, for the length of a block."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

from torch import nn

from saehooks.hosts.copied import after_copying

Method = Callable[..., Any]

_LOCK = threading.Lock()
"""Held while a stand-in comes or goes, so that threads that share a model find one stand-in."""


class _Layer:
    """One block's wrapper, around whatever is below it at the moment of the call."""

    def __init__(self, below: Method, around: Callable[[Method], Method]):
        self.below = below

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.below(*args, **kwargs)

        self.wrapper = around(update_wrapper(forward, below))


class _StandIn:
    """What stands in the module's ``__dict__`` while any block wraps the method; blocks may end in any order."""

    def __init__(self, module: nn.Module, name: str):
        self._module, self._name = module, name
        self._own = module.__dict__.get(name)
        self._method = getattr(module, name)
        self._layers: list[_Layer] = []
        update_wrapper(self, self._method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._layers[-1].wrapper if self._layers else self._method)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Method:
        # A copy of the model, made inside a block, runs itself and not the model that it is a copy of.
        if self._own is not None:
            return copy.deepcopy(self._own, memo)
        copied = memo.get(id(self._module))
        if copied is None:
            return self._method
        after_copying(memo, lambda: copied.__dict__.pop(self._name, None))
        return getattr(type(copied), self._name).__get__(copied)

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (self._module, self._name)) if self._own is None else (_own, (self._own,))

    def add(self, around: Callable[[Method], Method]) -> _Layer:
        layer = _Layer(self._layers[-1].wrapper if self._layers else self._method, around)
        self._layers.append(layer)
        # Not setattr: some subclasses of nn.Module give it meanings of their own.
        self._module.__dict__[self._name] = self
        return layer

    def drop(self, layer: _Layer) -> None:
        place = self._layers.index(layer)
        del self._layers[place]
        if place < len(self._layers):
            self._layers[place].below = layer.below
        # Other code may have wrapped the method meanwhile: its wrapper stays, around a stand-in that adds nothing.
        if not self._layers and self._module.__dict__.get(self._name) is self:
            if self._own is None:
                del self._module.__dict__[self._name]
            else:
                self._module.__dict__[self._name] = self._own


def _own(method: Method) -> Method:
    return method


@contextmanager
def replaced_method(module: nn.Module, name: str, around: Callable[[Method], Method]) -> Iterator[None]:
    """Put ``around(method)`` in place of one method of one module for the length of the block.

    >>> same = nn.Identity()
    >>> with replaced_method(same, "forward", lambda forward: lambda x: 2 * forward(x)):
    ...     same(3)
    6
    >>> same(3), "forward" in vars(same)
    (3, False)
    """
    with _LOCK:
        current = module.__dict__.get(name)
        stand_in = current if isinstance(current, _StandIn) else _StandIn(module, name)
        layer = stand_in.add(around)
    try:
        yield
    finally:
        with _LOCK:
            stand_in.drop(layer)
