"""The same views for the terminal, as rich renderables."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from saehooks.errors import ConfigError
from saehooks.show.values import Row, Shades, as_floats, columns_of, number, visible

if TYPE_CHECKING:  # rich is imported where something is drawn
    from rich.console import RenderableType
    from rich.style import Style
    from rich.table import Table
    from rich.text import Text

_WEAK, _BLUE, _RED = (214, 228, 252), (24, 88, 205), (190, 50, 30)
_WEAK_RED = (252, 222, 216)


def tokens_text(
    tokens: Sequence[str],
    values: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    signed: bool = False,
) -> Text:
    """Tokens shaded by a value each, as background colours; NaN (left out) is dimmed.

    Args:
        tokens: n decoded tokens.
        values: (n,) numbers.
        low, high: the values of the weakest and strongest shade; by default the extremes.
        signed: blue above 0, red below.
    Raises:
        ConfigError: tokens and values are not equally long.
    """
    from rich.text import Text

    numbers = as_floats(values)
    if len(numbers) != len(tokens):
        raise ConfigError(f"one value per token: got {len(tokens)} tokens and {len(numbers)} values")
    shades = Shades.over(numbers, low, high, signed)
    text = Text(overflow="fold")
    for token, value in zip(tokens, numbers, strict=True):
        shown = token if token.strip("\r\n") == token else visible(token) + "\n" * token.count("\n")
        text.append(shown, style=shade_style(shades(value)))
    return text


def shade_style(shade: float | None) -> Style:
    """Background of a shade in -1..1, with a foreground that stays readable on it."""
    from rich.style import Style

    if shade is None:
        return Style(dim=True)
    if shade == 0:
        return Style()
    weak, strong = (_WEAK, _BLUE) if shade > 0 else (_WEAK_RED, _RED)
    mix = [round(w + (s - w) * abs(shade)) for w, s in zip(weak, strong, strict=True)]
    light = 0.299 * mix[0] + 0.587 * mix[1] + 0.114 * mix[2] > 140
    return Style(color="#000000" if light else "#ffffff", bgcolor=f"rgb({mix[0]},{mix[1]},{mix[2]})")


def table(rows: Sequence[Row], columns: Sequence[str] | None = None, *, title: str | None = None) -> Table:
    """Rows (mappings, or sequences with ``columns``) as a rich table; numbers are right-aligned."""
    from rich.table import Table
    from rich.text import Text

    names, cells = columns_of(rows, columns)
    out = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for i, name in enumerate(names):
        numeric = all(not isinstance(row[i], (str, bool)) for row in cells if row[i] is not None)
        out.add_column(name, justify="right" if numeric and cells else "left", overflow="fold")
    for row in cells:
        out.add_row(*[Text(number(cell)) for cell in row])
    return out


def pairs(items: Mapping[str, Any], *, title: str | None = None) -> Table:
    """Names and numbers as a two-column table without a heading."""
    from rich.table import Table
    from rich.text import Text

    out = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    out.add_column("name", style="bold")
    out.add_column("value", justify="right")
    for name, value in items.items():
        out.add_row(name, Text(number(value)))
    return out


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A row of blocks, highest value tallest, at most ``width`` characters (values are averaged into them).

    >>> sparkline([0.0, 1.0, 2.0, 3.0])
    '▁▃▆█'
    """
    numbers = [value for value in values if value == value]
    if not numbers:
        return ""
    if len(numbers) > width:
        edges = [round(i * len(numbers) / width) for i in range(width + 1)]
        numbers = [sum(numbers[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(numbers), max(numbers) - min(numbers)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / span) if span else 0] for value in numbers)


def render(renderable: RenderableType, *, width: int | None = None, color: bool | None = None) -> str:
    """Draw a renderable into a string, as a ``__repr__`` needs it.

    Args:
        width: columns; by default the terminal's, 100 where there is none.
        color: ANSI colours; by default only when standard output is a terminal.
    """
    from rich.console import Console

    on = sys.stdout.isatty() if color is None else color
    if width is None and not on:
        width = 100
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=on,
        force_jupyter=False,  # in a notebook rich would display at once and leave the string empty
        no_color=None if on else True,
        color_system="truecolor" if on else None,
        highlight=False,
        legacy_windows=False,
    )
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip("\n").split("\n"))
