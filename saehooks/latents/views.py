"""An index and its latents in a notebook."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

import torch

from saehooks.show import contexts as show
from saehooks.show.html import table_html
from saehooks.show.values import number, visible

if TYPE_CHECKING:
    from saehooks.latents.index import LatentIndex
    from saehooks.latents.latent import Context, Latent

SHOWN = 12
"""Latents in the notebook repr of an index."""

CONTEXTS = 8
"""Contexts of a latent in a notebook."""


def index_html(index: LatentIndex) -> str:
    """What the index is of, and some latents spread over the range of densities."""
    fired = (index.counts > 0).nonzero()[:, 0]
    order = fired[index.counts[fired].argsort(descending=True, stable=True)]
    places = torch.linspace(0, max(0, len(order) - 1), min(SHOWN, len(order))).long()
    rows = [{**index.row(latent), "latent": str(latent)} for latent in order[places].tolist()]
    rows = [{**row, "density": f"{row['density']:.3%}"} for row in rows]
    head = escape(repr(index)).replace("\n", "<br>")
    return show.styled(
        f'<div class="sh-caption">{head}</div>' + table_html(rows, caption="from the densest to the rarest")
    )


def latent_html(latent: Latent) -> str:
    """A latent's figures, tokens, neighbours and contexts."""
    parts = [
        f'<div class="sh-latent"><b>latent {latent.latent}</b> '
        f'<span class="sh-words">{escape(latent.words)}</span></div>',
        f'<div class="sh-caption">{escape(latent.index.site)} · {escape(latent.facts())}</div>',
    ]
    if latent.dead:
        return show.styled("".join(parts))
    parts.append(show.quantile_svg(latent.index.quantiles[latent.latent].tolist()))
    for title, pairs in (("raises", latent.raises), ("lowers", latent.lowers)):
        if pairs:
            chips = " ".join(f"<code>{escape(visible(piece))}</code> {number(change)}" for piece, change in pairs[:8])
            parts.append(f'<div class="sh-near">{title}: {chips}</div>')
    for title, found in (("fires with", latent.fires_with), ("points like", latent.alike)):
        if found:
            near = ", ".join(
                f"{other} ({similarity:.2f}) <i>{escape(latent.index.words(other, 2))}</i>"
                for other, similarity in found[:6]
            )
            parts.append(f'<div class="sh-near">{title}: {near}</div>')
    parts += [
        _contexts_html("strongest", latent, latent.contexts),
        _contexts_html("drawn at random", latent, latent.sampled),
    ]
    return show.styled("".join(parts))


def _contexts_html(title: str, latent: Latent, found: list[Context]) -> str:
    high = max((context.value for context in latent.contexts), default=0.0)
    shown = "".join(_context_html(latent.index, context, high) for context in found[:CONTEXTS])
    return f'<div class="sh-caption">{title}</div><div class="sh-contexts">{shown}</div>' if shown else ""


def _context_html(index: LatentIndex, context: Context, high: float) -> str:
    head = f"{number(context.value)} · {context.quantile:.0%}"
    if context.tokens is not None:
        return show.context_html(
            [index.piece(token) for token in context.tokens], context.values, context.peak, high, head
        )
    leading, rows, columns = index.metadata["grid"] or (0, 0, 0)
    values = [0.0 if math.isnan(value) else value for value in context.values[leading:]]
    return show.picture_html(context.picture, values, (rows, columns), high, f"{index.word(context)} {head}".strip())
