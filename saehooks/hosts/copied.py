"""Leaving things out of a deep copy that is being made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _Afterwards:
    """Runs a function when it is dropped, which is when the memo of ``copy.deepcopy`` is."""

    def __init__(self, function: Callable[[], object]):
        self._function = function

    def __del__(self) -> None:
        self._function()


def after_copying(memo: dict[int, Any], function: Callable[[], object]) -> None:
    """Call a function when the copying that ``copy.deepcopy`` is doing is over.

    Args:
        memo: what ``__deepcopy__`` was given; it maps the id of an object to its copy.
        function: it must not hold the memo.

    >>> import copy
    >>> class Local:
    ...     def __deepcopy__(self, memo):
    ...         copied = memo[id(things)]
    ...         after_copying(memo, lambda: copied.pop("local"))
    >>> things = {"local": Local(), "mine": [1]}
    >>> copy.deepcopy(things)
    {'mine': [1]}
    """
    afterwards = _Afterwards(function)
    memo[id(afterwards)] = afterwards
