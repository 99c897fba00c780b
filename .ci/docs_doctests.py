"""For the documentation site: examples in docstrings become code blocks, and single backquotes stay plain code."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^ *>>>.*\n?(?:^(?! *>>>) *\S.*\n?)*)+", re.M)


class Doctests(griffe.Extension):
    """Fences the examples of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring is not None and "```" not in obj.docstring.value:
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called when a package has been read; `on_object` does not see it."""
        self.on_object(obj=pkg)


def fenced(found: re.Match[str]) -> str:
    """An example between fences, at its own indentation."""
    text = found[0].rstrip("\n")
    indent = re.match(" *", text)[0]  # type: ignore[index]
    return f"{indent}```pycon\n{text}\n{indent}```\n"
