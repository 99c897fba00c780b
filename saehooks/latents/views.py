"""An index, and the places where a latent fires, in a notebook."""

from __future__ import annotations

import math
from html import escape

import torch

from saehooks.latents.result import Context, SurveyResult
from saehooks.show import contexts as show
from saehooks.show.html import table_html
from saehooks.show.values import Markup, number

SHOWN = 12
"""Latents in the notebook repr of an index."""

CONTEXTS = 8
"""Contexts of a latent in a notebook."""

AROUND, PICTURES = 7, 3
"""In a cell of a table: tokens on either side of the strongest one, and images."""


def index_html(index: SurveyResult) -> str:
    """What the index is of, and some latents spread over the range of densities."""
    fired = (index.counts > 0).nonzero()[:, 0]
    order = fired[index.counts[fired].argsort(descending=True, stable=True)]
    places = torch.linspace(0, max(0, len(order) - 1), min(SHOWN, len(order))).long()
    rows = [{**index.row(latent), "latent": str(latent)} for latent in order[places].tolist()]
    rows = [
        {**row, "density": f"{row['density']:.3%}", "strongest at": strongest_html(index, int(row["latent"]))}
        for row in rows
    ]
    head = escape(repr(index)).replace("\n", "<br>")
    return show.styled(
        f'<div class="sh-caption">{head}</div>' + table_html(rows, caption="from the densest to the rarest")
    )


def contexts_html(result: SurveyResult, title: str, found: list[Context], high: float) -> str:
    """Some places where a latent fires, each shaded by its values; ``high`` is the value with the full colour."""
    shown = "".join(_context_html(result, context, high) for context in found[:CONTEXTS])
    return f'<div class="sh-caption">{title}</div><div class="sh-contexts">{shown}</div>' if shown else ""


def strongest_html(result: SurveyResult, latent: int) -> Markup:
    """Where a latent is strongest, for a cell of a table: a few shaded tokens, or its first images with patches."""
    found = result.contexts(latent)[: 1 if result.metadata["grid"] is None else PICTURES]
    if not found:
        return Markup("never fired")
    high, first = found[0].value, found[0]
    if first.tokens is None:
        return Markup("".join(_picture_html(result, one, high, "", side=48) for one in found))
    start, end = max(0, first.peak - AROUND), first.peak + AROUND + 1
    pieces = [result.piece(token) for token in first.tokens[start:end]]
    shown = show.shaded_html(pieces, first.values[start:end], first.peak - start, high)
    return Markup(f'<span class="sh-at">{shown}</span>')


def _context_html(index: SurveyResult, context: Context, high: float) -> str:
    head = f"{number(context.value)} · {context.quantile:.0%}"
    if context.tokens is not None:
        return show.context_html(
            [index.piece(token) for token in context.tokens], context.values, context.peak, high, head
        )
    return _picture_html(index, context, high, f"{index.word(context)} {head}".strip())


def _picture_html(index: SurveyResult, context: Context, high: float, caption: str, side: int = 96) -> str:
    leading, rows, columns = index.metadata["grid"] or (0, 0, 0)
    values = [0.0 if math.isnan(value) else value for value in context.values[leading:]]
    return show.picture_html(context.picture, values, (rows, columns), high, caption, side)
