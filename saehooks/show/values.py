"""How numbers and tokens are written, and how strongly a value is shaded: shared by HTML and terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any] | Sequence[Any]

LEFT_OUT = "left out"


class Markup(str):
    """A cell that is HTML already: tables for notebooks and pages write it as it is."""

    __slots__ = ()


def number(value: Any) -> str:
    """Write a number the way a table wants it: four significant digits, thousands separated, words as they are.

    >>> [number(value) for value in (0.123456, 12345, 12345.6, 1e-7, True, None, "sparsemax", -0.0)]
    ['0.1235', '12,345', '12,346', '1.000e-07', 'yes', '–', 'sparsemax', '0']
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if hasattr(value, "item") and getattr(value, "size", None) is not None and not isinstance(value, str):
        value = value.item()
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.3e}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def visible(token: str) -> str:
    """Make a token's whitespace and control characters visible, for tables and tooltips.

    >>> visible(" the"), visible("\\n"), visible("a\\tb")
    ('·the', '↵', 'a→b')
    """
    marks = {" ": "·", "\n": "↵", "\r": "␍", "\t": "→"}
    return "".join(marks.get(char, char if char.isprintable() else f"\\x{ord(char):02x}") for char in token)


def columns_of(rows: Sequence[Row], columns: Sequence[str] | None = None) -> tuple[list[str], list[list[Any]]]:
    """Turn rows (mappings, or sequences with ``columns`` given) into a heading and cells; a missing key is None."""
    names = list(columns or [])
    if not names:
        for row in rows:
            if isinstance(row, Mapping):
                names += [str(key) for key in row if str(key) not in names]
    cells = [[row.get(name) for name in names] if isinstance(row, Mapping) else list(row) for row in rows]
    return names, cells


@dataclass(frozen=True)
class Shades:
    """Maps values to shades between -1 and 1; NaN (a position left out) to None."""

    low: float
    high: float
    signed: bool = False

    @classmethod
    def over(
        cls, values: Sequence[float], low: float | None = None, high: float | None = None, signed: bool = False
    ) -> Shades:
        """Shades that span the finite values; signed ones are symmetric about 0."""
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        if signed:
            bound = max(abs(value) for value in finite) if high is None else high
            return cls(-bound, bound, True)
        return cls(min(finite) if low is None else low, max(finite) if high is None else high)

    def __call__(self, value: float) -> float | None:
        """Shade of one value: 0..1, or -1..1 when signed.

        >>> Shades(0.0, 10.0)(5.0), Shades(-2.0, 2.0, signed=True)(-1.0), Shades(0.0, 1.0)(float("nan"))
        (0.5, -0.5, None)
        """
        if math.isnan(value):
            return None
        if self.signed:
            return 0.0 if self.high == 0 else max(-1.0, min(1.0, value / self.high))
        span = self.high - self.low
        return 0.0 if span <= 0 else max(0.0, min(1.0, (value - self.low) / span))


def as_floats(values: Any) -> list[float]:
    """A flat list of floats out of a tensor, an array or any sequence."""
    flat = values.detach().cpu().flatten() if hasattr(values, "detach") else values
    return [float(value) for value in (flat.tolist() if hasattr(flat, "tolist") else flat)]
