"""Bars and curves as plain HTML and SVG: they follow a light or dark page, wrap, and shrink to a narrow screen."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from html import escape
from itertools import pairwise

from saehooks.errors import ConfigError
from saehooks.show.values import Markup, number

CHART_STYLE = """
.sh-bars{margin:.6em 0 1em;font:14px/1.5 system-ui,sans-serif;font-variant-numeric:tabular-nums;max-width:46em}
.sh-bars h4{margin:.7em 0 .1em;font-size:1em}
.sh-bar{display:grid;grid-template-columns:minmax(6em,13em) 1fr 4.5em;gap:.7em;align-items:center}
.sh-bar>span:first-child{opacity:.8;overflow-wrap:anywhere}.sh-bar>span:last-child{text-align:right}
.sh-bar.sh-mine>span{opacity:1;font-weight:600}
.sh-track{position:relative;height:1em;border-radius:2px;background:rgba(128,128,128,.1)}
.sh-track i{position:absolute;top:.1em;bottom:.1em;border-radius:2px;background:currentColor;opacity:.38}
.sh-mine .sh-track i{background:rgb(40,110,225);opacity:1}
.sh-track u{position:absolute;top:-.1em;bottom:-.1em;width:1px;background:currentColor;opacity:.6}
.sh-curves{display:block;width:100%;max-width:24em;height:auto;color:inherit}
.sh-cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(17em,1fr));gap:1.2em 1.6em;margin:1em 0}
.sh-card h3{margin:0;font-size:1.05em}.sh-card small{opacity:.8}
.sh-thumbs{display:flex;flex-wrap:wrap;gap:.5em;margin-top:.4em}
mark.sh-mark{background:rgba(40,110,225,.32);color:inherit;border-radius:3px;padding:0 .1em}
@media (max-width:34em){.sh-bar{grid-template-columns:7em 1fr 4.4em;gap:.4em;font-size:.92em}}
"""


def bars_html(groups: Mapping[str, Mapping[str, float]], *, highlight: Collection[str] = (), caption: str = "") -> str:
    """Horizontal bars, each with its name before it and its number after it, all on one scale through 0.

    Args:
        groups: values by name, under a heading each; one heading may be empty.
        highlight: the names that matter, in blue; the others are muted.
        caption: what the numbers are.
    Raises:
        ConfigError: there is nothing to draw.

    >>> 'left:0.0%;width:50.0%' in bars_html({"": {"top": 1.0, "random": 2.0}}, highlight=["top"])
    True
    """
    finite = [value for series in groups.values() for value in series.values() if math.isfinite(value)]
    if not finite:
        raise ConfigError("no bars to draw: give at least one finite number")
    low, high = min(0.0, *finite), max(0.0, *finite)
    span = (high - low) or 1.0

    def bar(name: str, value: float) -> str:
        known = value if math.isfinite(value) else 0.0
        left, width = 100 * (min(0.0, known) - low) / span, 100 * abs(known) / span
        kind = "sh-bar sh-mine" if name in highlight else "sh-bar"
        zero = f'<u style="left:{100 * -low / span:.1f}%"></u>' if low < 0 else ""
        return (
            f'<div class="{kind}"><span>{escape(name)}</span><span class="sh-track">'
            f'<i style="left:{left:.1f}%;width:{width:.1f}%"></i>{zero}</span><span>{number(float(value))}</span></div>'
        )

    parts = [f'<div class="sh-caption">{escape(caption)}</div>'] if caption else []
    for heading, series in groups.items():
        parts += [f"<h4>{escape(heading)}</h4>"] if heading else []
        parts += [bar(name, value) for name, value in series.items()]
    return f'<div class="sh-bars">{"".join(parts)}</div>'


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 300, 150, 34, 62, 8, 30
"""Of a small chart of curves, in its own units: all of it, and its margins."""


def curves_svg(
    ticks: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    high: float,
    highlight: Collection[str] = (),
    xlabel: str = "",
    label: str = "",
) -> str:
    """A small chart of lines over evenly spaced ticks, each line named at its end.

    Args:
        ticks: what stands under each place.
        series: as many values by name, between 0 and ``high``.
        highlight: the lines that matter, in blue; the others are muted.
        xlabel: under the ticks.
        label: what the picture shows, for readers who do not see it.
    Raises:
        ConfigError: a line has not one value for each tick.
    """
    if not ticks or any(len(values) != len(ticks) for values in series.values()):
        raise ConfigError(f"one value for each of the {len(ticks)} ticks, at least one")
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(place: int) -> float:
        return LEFT + across * (place / (len(ticks) - 1) if len(ticks) > 1 else 0.5)

    def y(value: float) -> float:
        return TOP + down * (1 - value / high)

    shapes = []
    for share in (0, 0.5, 1):
        at, text = y(high * share), number(float(high * share))
        shapes.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke-opacity=".25"/>')
        shapes.append(f'<text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    for place, tick in enumerate(ticks):
        shapes.append(f'<text x="{x(place):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{escape(tick)}</text>')
    shapes.append(f'<text x="{LEFT + across / 2:.1f}" y="{HEIGHT - 3}" text-anchor="middle">{escape(xlabel)}</text>')
    ends = _apart([y(values[-1]) for values in series.values()])
    for (name, values), end in zip(series.items(), ends, strict=True):
        mine = name in highlight
        ink = 'stroke="rgb(40,110,225)" stroke-width="2.2"' if mine else 'stroke-opacity=".5" stroke-width="1.5"'
        fill = 'fill="rgb(40,110,225)"' if mine else 'fill-opacity=".55"'
        points = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in enumerate(values))
        shapes.append(f'<polyline points="{points}" fill="none" {ink}/>')
        shapes += [
            f'<circle cx="{x(place):.1f}" cy="{y(value):.1f}" r="3" stroke="none" {fill}>'
            f"<title>{escape(name)}, {escape(ticks[place])}: {number(float(value))}</title></circle>"
            for place, value in enumerate(values)
        ]
        weight = ' font-weight="600"' if mine else ""
        shapes.append(f'<text x="{WIDTH - RIGHT + 6}" y="{end + 4:.1f}"{weight}>{escape(name)}</text>')
    return (
        f'<svg class="sh-curves" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}" '
        f'font-size="11" font-family="system-ui,sans-serif" fill="currentColor" stroke="currentColor">'
        f"{''.join(shapes)}</svg>".replace("<text ", '<text stroke="none" ')
    )


def _apart(heights: Sequence[float], least: float = 12.0) -> list[float]:
    """Heights of labels, moved down where two would lie on each other.

    >>> _apart([10.0, 50.0, 12.0])
    [10.0, 50.0, 22.0]
    """
    placed = list(heights)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    for above, below in pairwise(order):
        placed[below] = max(placed[below], placed[above] + least)
    return placed


def marked_html(text: str, words: Collection[str], pattern: str = r"[A-Za-z]{4,}") -> Markup:
    """A text with some of its words highlighted, whatever their case.

    Args:
        words: in small letters.
        pattern: what a word is.

    >>> marked_html("The Isles & more", ["isles"])
    'The <mark class="sh-mark">Isles</mark> &amp; more'
    """
    parts, done = [], 0
    for found in re.finditer(pattern, text):
        if found[0].lower() in words:
            parts.append(escape(text[done : found.start()]))
            parts.append(f'<mark class="sh-mark">{escape(found[0])}</mark>')
            done = found.end()
    return Markup("".join(parts) + escape(text[done:]))
