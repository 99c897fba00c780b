"""What to say to the names that other libraries use: which of ours was meant."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from saehooks.errors import UnknownNameError


def no_attribute(owner: Any, name: str, answers: Mapping[str, str], what: str = "") -> UnknownNameError:
    """The error for an attribute that does not exist, with what to write instead.

    Args:
        owner: what was asked.
        answers: what to write, by the names that people try.
        what: the owner in words; by default its class.

    >>> raise no_attribute([], "length", {"length": "write len(list)"})
    Traceback (most recent call last):
    saehooks.errors.UnknownNameError: 'list' object has no attribute 'length'; write len(list)
    """
    what = what or f"'{type(owner).__name__}' object"
    hint = answers.get(name, "")
    if not hint and not name.startswith("_"):
        near = get_close_matches(name, [one for one in dir(owner) if not one.startswith("_")], 1, cutoff=0.75)
        hint = f"did you mean {near[0]}?" if near else ""
    return UnknownNameError(f"{what} has no attribute {name!r}" + (f"; {hint}" if hint else ""))
