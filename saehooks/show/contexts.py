"""Short contexts, images with their patches and distributions as HTML that follows a light or dark page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from saehooks.show.html import STYLE, colour
from saehooks.show.values import number

CONTEXT_STYLE = """
.sh-latent{font-size:1.15em}.sh-words{opacity:.8}
.sh-context{display:flex;gap:.8em;margin:.15em 0;align-items:baseline}
.sh-context>small{flex:none;width:7em;opacity:.7;text-align:right;font-variant-numeric:tabular-nums}
.sh-context>span{white-space:pre-wrap;overflow-wrap:anywhere}
.sh-context b,.sh-context span span{border-radius:3px;padding:.1em 0}
.sh-context b{font-weight:600;text-decoration:underline}
.sh-near{margin:.2em 0}
.sh-quantiles{display:block;max-width:100%;color:inherit}
"""


def styled(body: str) -> str:
    """A fragment with the styles it needs, so that it can stand alone in a notebook."""
    return f'<style>{STYLE}{CONTEXT_STYLE}</style><div class="sh">{body}</div>'


def context_html(pieces: Sequence[str], values: Sequence[float], peak: int, high: float, head: str = "") -> str:
    """One line of tokens shaded by a latent's value at each, the place that was looked for underlined.

    Args:
        pieces: n tokens as text.
        values: n numbers, NaN where the SAE does not act.
        peak: the place in ``pieces``.
        high: the value with the full shade.
        head: before the line.
    """
    shown = shaded_html(pieces, values, peak, high)
    return f'<div class="sh-context"><small>{escape(head)}</small><span>{shown}</span></div>'


def shaded_html(pieces: Sequence[str], values: Sequence[float], peak: int, high: float) -> str:
    """Tokens shaded by a latent's value at each, without a line of their own: see `context_html`."""
    spans = []
    for place, (piece, value) in enumerate(zip(pieces, values, strict=True)):
        shown = escape(piece.replace("\n", "↵"))
        shade = 0.0 if math.isnan(value) or not high else max(-1.0, min(1.0, value / abs(high)))
        if place == peak or shade:
            tag = "b" if place == peak else "span"
            shown = f'<{tag} style="background:{colour(shade)}" title="{number(float(value))}">{shown}</{tag}>'
        spans.append(shown)
    return "".join(spans)


def picture_html(
    picture: Any, values: Sequence[float], grid: tuple[int, int], high: float, caption: str = "", side: int = 96
) -> str:
    """An image with a latent's values on its patches laid over it.

    Args:
        picture: (3, height, width) uint8, or None.
        values: rows x columns numbers; at or below 0 nothing is drawn.
        grid: patch rows and columns.
        high: the value drawn at full strength.
        side: pixels on the page.
    """
    rows, columns = grid
    drawn = ""
    if rows and columns and len(values) == rows * columns:
        drawn = "".join(
            f'<rect x="{i % columns}" y="{i // columns}" width="1" height="1" fill="rgb(235,50,30)" '
            f'opacity="{0.72 * min(1.0, value / high):.2f}"/>'
            for i, value in enumerate(values)
            if high > 0 and value > 0
        )
    image = (
        ""
        if picture is None
        else (
            f'<image href="{png_uri(picture)}" width="{columns or 1}" height="{rows or 1}" preserveAspectRatio="none" '
            'style="image-rendering:pixelated"/>'
        )
    )
    box = f"0 0 {columns or 1} {rows or 1}"
    return (
        f'<div class="sh-picture"><svg width="{side}" height="{side}" viewBox="{box}">{image}{drawn}</svg>'
        f"{escape(caption)}</div>"
    )


def png_uri(picture: Any) -> str:
    """A (3, height, width) uint8 image as a data URI.

    Raises:
        ImportError: Pillow is not installed; every vision model's package brings it.
    """
    from PIL import Image

    out = io.BytesIO()
    array = np.asarray(picture.cpu() if hasattr(picture, "cpu") else picture)
    Image.fromarray(array.transpose(1, 2, 0)).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def quantile_svg(quantiles: Sequence[float], *, width: int = 420, height: int = 64, bars: int = 40) -> str:
    """A histogram drawn from evenly spaced quantiles (0 to 100%), with the median and the 95% quantile marked."""
    heights, low, high = histogram(quantiles, bars)
    top = max(heights) or 1.0
    step = width / bars
    shapes = "".join(
        f'<rect x="{i * step:.1f}" y="{(height - 16) * (1 - value / top):.1f}" width="{step - 1:.1f}" '
        f'height="{(height - 16) * value / top:.1f}" fill="rgb(40,110,225)" opacity=".75"/>'
        for i, value in enumerate(heights)
        if value
    )
    n = len(quantiles) - 1
    marks, taken = [], [(0.0, 7.0 * len(number(low))), (width - 7.0 * len(number(high)), float(width))]
    for q, name in ((0.5, "50%"), (0.95, "95%")):
        x = width * (quantiles[round(q * n)] - low) / (high - low) if high > low else 0.0
        line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 16}" '
        marks.append(line + 'stroke="currentColor" stroke-dasharray="3 2"/>')
        if all(x + 14 < start or x - 14 > end for start, end in taken):  # where there is room for its name
            taken.append((x - 14, x + 14))
            marks.append(f'<text x="{x:.1f}" y="{height - 4}" text-anchor="middle">{name}</text>')
    ends = f'<text x="0" y="{height - 4}">{number(low)}</text>'
    ends += f'<text x="{width}" y="{height - 4}" text-anchor="end">{number(high)}</text>'
    return (
        f'<svg class="sh-quantiles" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="histogram of its values" font-size="11" fill="currentColor">{shapes}{"".join(marks)}{ends}</svg>'
    )


def histogram(quantiles: Sequence[float], bars: int) -> tuple[list[float], float, float]:
    """Shares of the values in equal bars between the smallest and the largest, from evenly spaced quantiles.

    >>> histogram([0.0, 1.0, 2.0, 4.0], 2)
    ([0.6666666666666666, 0.33333333333333337], 0.0, 4.0)
    """
    grid = np.asarray(quantiles, dtype=float)
    low, high = float(grid[0]), float(grid[-1])
    if not high > low:
        return [1.0] + [0.0] * (bars - 1), low, high
    shares = np.interp(np.linspace(low, high, bars + 1), grid, np.linspace(0, 1, len(grid)))
    return np.diff(shares).tolist(), low, high
