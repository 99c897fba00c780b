"""HTML for notebooks and for the demo's page: shaded tokens, tables, one self-contained page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from saehooks.errors import ConfigError
from saehooks.show.charts import CHART_STYLE
from saehooks.show.values import LEFT_OUT, Markup, Row, Shades, as_floats, columns_of, number, visible

STYLE = """
.sh{font:14px/1.6 system-ui,sans-serif;max-width:70em}
.sh-caption{opacity:.75;margin:.2em 0;font-size:.92em}
.sh-tokens{position:relative;padding-bottom:2em}
.sh-text{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.9;font-size:15px}
.sh-token{border-radius:3px;padding:.12em 0;cursor:default;outline-offset:1px}
.sh-token:hover,.sh-token:focus{outline:2px solid currentColor}
.sh-token:hover::after,.sh-token:focus::after{content:attr(data-tip);position:absolute;left:0;right:0;bottom:0;
 white-space:nowrap;overflow:hidden;text-overflow:ellipsis;font:12.5px/1.5 ui-monospace,monospace;opacity:.9}
.sh-tokens:has(.sh-token:hover) .sh-token:focus:not(:hover)::after{content:none}
.sh-out{opacity:.55}
.sh-scale{display:inline-block;width:9em;height:.75em;border-radius:3px;vertical-align:baseline;margin:0 .4em;
 border:1px solid rgba(128,128,128,.5)}
.sh table{border-collapse:collapse;margin:.5em 0;font-variant-numeric:tabular-nums}
.sh th,.sh td{padding:.25em .8em;border-bottom:1px solid rgba(128,128,128,.35);text-align:left;background:none;
 white-space:normal;overflow-wrap:break-word}
.sh th{border-bottom-width:2px;font-weight:600}
.sh td.n,.sh th.n{text-align:right}
.sh-at{white-space:pre-wrap;overflow-wrap:anywhere}.sh-at b,.sh-at span{border-radius:3px;padding:.1em 0}
.sh-at b{font-weight:600;text-decoration:underline}
.sh-scroll{overflow-x:auto}.sh td:has(.sh-at){min-width:17em}
@media (max-width:40em){.sh table{font-size:13px}.sh th,.sh td{padding:.25em .4em}.sh td:has(.sh-at){min-width:13em}}
.sh-picture{display:inline-block;margin:.2em;text-align:center;font-size:12px;vertical-align:top}
.sh-picture svg{display:block;margin:0 auto}
"""

PAGE_STYLE = """
:root{color-scheme:light dark;--ink:#1b1d22;--paper:#fff;--soft:#f3f4f7;--accent:#1f5fc4}
@media (prefers-color-scheme:dark){:root{--ink:#e7e9ee;--paper:#15171c;--soft:#20242c;--accent:#8db7ff}}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.6 system-ui,sans-serif}
main{max-width:60em;margin:0 auto;padding:2em 1.2em 4em}
h1{line-height:1.2;margin:0 0 .3em}h2{margin:2.2em 0 .4em;border-top:1px solid rgba(128,128,128,.35);padding-top:1em}
h3{margin:1.4em 0 .3em}
a{color:var(--accent)}
pre{background:var(--soft);padding:.8em 1em;border-radius:6px;white-space:pre-wrap;overflow-wrap:anywhere;
 font:13.5px/1.5 ui-monospace,monospace}
img{max-width:100%;height:auto;border-radius:6px}
.scroll{overflow-x:auto}
nav ol{columns:2;margin:.5em 0}
footer{margin-top:3em;opacity:.7;font-size:.9em}
@media (max-width:40em){nav ol{columns:1}}
"""

_BLUE, _RED = "40,110,225", "215,65,40"  # black and white text both stay readable on these at the strongest shade
_STRONGEST = 0.72


def colour(shade: float | None) -> str:
    """CSS background of a shade in -1..1, drawn over whatever the page's own background is."""
    if not shade:
        return "transparent"
    return f"rgba({_BLUE if shade > 0 else _RED},{abs(shade) * _STRONGEST:.3f})"


def tokens_html(
    tokens: Sequence[str],
    values: Any,
    *,
    top: Sequence[Sequence[tuple[int, float]]] | None = None,
    unit: str = "latents",
    caption: str = "",
    low: float | None = None,
    high: float | None = None,
    signed: bool = False,
) -> str:
    """Draw tokens shaded by a value each; pointing at one (or tabbing to it) shows its number and its latents.

    Readable in light and dark notebooks: the shade is laid over the page's own background.

    Args:
        tokens: n decoded tokens, with the spaces they start with.
        values: (n,) numbers; NaN marks a position that was left out.
        top: for each token its strongest latents as (latent, value).
        unit: what a value counts, for tooltip and scale.
        caption: a line above.
        low, high: the values that get no shade and full shade; by default the extremes.
        signed: shade positive values blue and negative ones red, symmetric about 0.
    Raises:
        ConfigError: tokens, values and top are not equally long.
    """
    numbers = as_floats(values)
    if len(numbers) != len(tokens) or (top is not None and len(top) != len(tokens)):
        raise ConfigError(
            f"one value per token: got {len(tokens)} tokens, {len(numbers)} values"
            + ("" if top is None else f" and top latents of {len(top)} tokens")
        )
    shades = Shades.over(numbers, low, high, signed)
    spans = [
        _token_span(position, token, value, shades(value), unit, top[position] if top is not None else ())
        for position, (token, value) in enumerate(zip(tokens, numbers, strict=True))
    ]
    head = f'<div class="sh-caption">{escape(caption)}{" · " if caption else ""}{_scale(shades, unit)}</div>'
    return f'{_styled()}<div class="sh sh-tokens">{head}<div class="sh-text">{"".join(spans)}</div></div>'


def _token_span(
    position: int, token: str, value: float, shade: float | None, unit: str, top: Sequence[tuple[int, float]]
) -> str:
    amount = LEFT_OUT if shade is None else f"{number(value)} {unit}"
    tip = f"{position}: {visible(token)}   {amount}"
    if top:
        tip += "   top: " + ", ".join(f"{latent} ({number(float(strength))})" for latent, strength in top)
    shown = escape(token) if token.strip("\r\n") == token else escape(visible(token)) + "\n" * token.count("\n")
    kind = "sh-token sh-out" if shade is None else "sh-token"
    style = "" if not shade else f' style="background:{colour(shade)}"'
    return f'<span class="{kind}" tabindex="0"{style} data-tip="{escape(tip, quote=True)}">{shown}</span>'


def _scale(shades: Shades, unit: str) -> str:
    left = colour(-1.0) if shades.signed else "transparent"
    bar = (
        f'<span class="sh-scale" style="background:linear-gradient(to right,{left},transparent,{colour(1.0)})"></span>'
    )
    if not shades.signed:
        bar = f'<span class="sh-scale" style="background:linear-gradient(to right,transparent,{colour(1.0)})"></span>'
    return f"{number(shades.low)}{bar}{number(shades.high)} {escape(unit)}"


def table_html(rows: Sequence[Row], columns: Sequence[str] | None = None, *, caption: str = "") -> str:
    """Draw rows (mappings, or sequences with ``columns``) as a table; numbers are right-aligned.

    >>> "<td class=n>0.5</td>" in table_html([{"name": "<a>", "nmse": 0.5}])
    True
    """
    names, cells = columns_of(rows, columns)
    numeric = [all(_is_number(row[i]) for row in cells if row[i] is not None) for i in range(len(names))]
    kinds = [" class=n" if flag and cells else "" for flag in numeric]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, names, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{_cell(c)}</td>" for kind, c in zip(kinds, row, strict=True)) + "</tr>"
        for row in cells
    )
    title = f'<div class="sh-caption">{escape(caption)}</div>' if caption else ""
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'{_styled()}<div class="sh">{title}<div class="sh-scroll"><table>{table}</table></div></div>'


def _cell(value: Any) -> str:
    return str(value) if isinstance(value, Markup) else escape(number(value))


def _is_number(value: Any) -> bool:
    return not isinstance(value, (str, bool)) and (isinstance(value, (int, float)) or hasattr(value, "item"))


def paragraph(text: str) -> str:
    """Plain text as a paragraph; ``backquoted`` words become code."""
    pieces = escape(text).split("`")
    return "<p>" + "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(pieces)) + "</p>"


def code(text: str) -> str:
    """Program text or a transcript, as it is."""
    return f"<pre>{escape(text.strip(chr(10)))}</pre>"


def image(png: bytes, alt: str, *, photo: bool = False) -> str:
    """A PNG carried inside the page; charts have transparent paper and read in light and dark."""
    data = base64.b64encode(png).decode("ascii")
    kind = "photo" if photo else "chart"
    return f'<img class="{kind}" alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}">'


@dataclass
class Section:
    """One headed part of a page."""

    title: str
    """Heading, plain text."""
    parts: list[str] = field(default_factory=list)
    """HTML pieces, in order."""

    def add(self, *parts: str) -> Section:
        """Append HTML pieces."""
        self.parts += parts
        return self


def page(title: str, sections: Sequence[Section], *, lead: str = "", footer: str = "") -> str:
    """Put sections on one self-contained page: no script, no font, no picture from elsewhere."""
    links = "".join(f'<li><a href="#part-{i}">{escape(s.title)}</a></li>' for i, s in enumerate(sections, 1))
    body = "".join(
        f'<section id="part-{i}"><h2>{i}. {escape(s.title)}</h2>{"".join(s.parts)}</section>'
        for i, s in enumerate(sections, 1)
    ).replace(_styled(), "")
    contents = f"<nav><ol>{links}</ol></nav>" if len(sections) > 1 else ""
    opening = paragraph(lead) if lead else ""
    end = f"<footer>{paragraph(footer)}</footer>" if footer else ""
    styles = PAGE_STYLE + STYLE + CHART_STYLE
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{styles}</style></head>'
        f"<body><main><h1>{escape(title)}</h1>{opening}{contents}{body}{end}</main></body></html>\n"
    )


def _styled() -> str:
    """The style element every fragment carries, so that it can stand alone in a notebook."""
    return f"<style>{STYLE}</style>"
