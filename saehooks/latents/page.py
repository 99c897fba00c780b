"""All latents of an SAE on one HTML page that needs no server and no network."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saehooks.causal.ranking import Ranking
from saehooks.causal.words import check_index
from saehooks.errors import ConfigError
from saehooks.latents.cofiring import Neighbours
from saehooks.latents.result import SurveyResult
from saehooks.show.contexts import png_uri
from saehooks.storage import write_file

LIMIT = 30_000_000
"""Bytes of a page, unless it is said."""

GRID = 41
"""Quantiles carried of each latent."""

KINDS = {"f4": "<f4", "u4": "<u4", "u2": "<u2", "u1": "u1"}
NONE = 0xFFFFFFFF
LEFT_OUT = 255
"""Shade of a position where the SAE does not act."""


def write_page(
    index: SurveyResult,
    file: str | Path,
    *,
    title: str = "",
    contexts: int = 8,
    sampled: int = 6,
    effects: Any = None,
    limit: int = LIMIT,
) -> Path:
    """Write the page of an index; see `LatentIndex.page`.

    Raises:
        ConfigError: effects are not one number for each latent, or are a ranking of another SAE or site; or the page
            cannot be made small enough.
    """
    numbers = None if effects is None else _effects(effects, index)
    while True:
        page = _page(index, title or f"Latents at {index.site}", contexts, sampled, numbers)
        if len(page) <= limit:
            break
        if contexts <= 1 and sampled == 0:
            raise ConfigError(f"the page takes {len(page):,} bytes with one context for each latent, limit={limit:,}")
        contexts, sampled = max(1, contexts * 2 // 3), sampled * 2 // 3
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, page)
    return path


def _page(index: SurveyResult, title: str, contexts: int, sampled: int, effects: np.ndarray | None) -> bytes:
    head, arrays = _described(index), _figures(index)
    pieces = _Pieces(index)
    if effects is not None:
        arrays["effects"] = ("f4", effects)
    _add_logits(index, head, arrays, pieces)
    _add_neighbours(index, head, arrays)
    _add_contexts(index, head, arrays, pieces, contexts, sampled)
    head["pieces"] = pieces.texts
    parts = {
        "title": escape(title),
        "about": escape(_about(index)),
        "footer": f"{escape(index.metadata['sae'])} · keys: <kbd>/</kbd> search, <kbd>↑</kbd> <kbd>↓</kbd> step, "
        "<kbd>Enter</kbd> first hit, <kbd>Esc</kbd> clear",
        "style": _template("page.css"),
        "script": _template("page.js"),
        "data": base64.b64encode(_packed(head, arrays)).decode("ascii"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _template("page.html")).encode("utf-8")


def _template(name: str) -> str:
    return resources.files("saehooks.latents").joinpath("template").joinpath(name).read_text(encoding="utf-8")


def _packed(head: dict[str, Any], arrays: dict[str, tuple[str, Any]]) -> bytes:
    """A gzip of: the length of the head, the head as JSON, and each array on a multiple of four bytes."""
    ready = {name: np.ascontiguousarray(array, dtype=KINDS[kind]) for name, (kind, array) in arrays.items()}
    places: dict[str, list[Any]] = {name: [kind, 0, ready[name].size] for name, (kind, _) in arrays.items()}

    def text() -> bytes:
        found = json.dumps({**head, "arrays": places}, ensure_ascii=False).encode()
        return found + b" " * (-len(found) % 4)

    start = len(text()) + 12 * len(places) + 4
    start += -start % 4
    for name, array in ready.items():
        places[name][1] = start
        start += array.nbytes + (-array.nbytes % 4)
    opening = text()
    first = next(iter(places.values()))[1]
    opening += b" " * (first - 4 - len(opening))
    body = b"".join(array.tobytes() + b"\0" * (-array.nbytes % 4) for array in ready.values())
    return gzip.compress(len(opening).to_bytes(4, "little") + opening + body, 9, mtime=0)


def _about(index: SurveyResult) -> str:
    kind = "images" if index.metadata["grid"] is not None else "sequences"
    model = index.metadata["model"].get("model_name") or ""
    partial = "" if index.complete else " (interrupted: partial)"
    return (
        f"{model + ' · ' if model else ''}{index.site} · {len(index):,} latents, {len(index.dead):,} of them dead · "
        f"{index.positions:,} positions of {index.sequences:,} {kind}{partial}"
    )


def _described(index: SurveyResult) -> dict[str, Any]:
    pictures = index.metadata["grid"] is not None
    return {
        "n": len(index),
        "positions": index.positions,
        "kind": "images" if pictures else "text",
        "patches": index.metadata["grid"],
        "words": [index.words(latent) for latent in range(len(index))],
        "labels": {},
        "grid": GRID,
    }


def _figures(index: SurveyResult) -> dict[str, tuple[str, Any]]:
    places = torch.linspace(0, index.quantiles.shape[1] - 1, GRID)
    low = places.floor().long().clamp(max=index.quantiles.shape[1] - 2)
    rows = torch.lerp(index.quantiles[:, low], index.quantiles[:, low + 1], places - low)
    return {"counts": ("u4", index.counts.clamp(max=NONE)), "quantiles": ("f4", rows)}


class _Pieces:
    """The tokens on the page, numbered as they come."""

    def __init__(self, index: SurveyResult) -> None:
        self._index = index
        self.texts: list[str] = []
        self._numbers: dict[int, int] = {}

    def number(self, token: int) -> int:
        """The number of a token on the page."""
        found = self._numbers.get(token)
        if found is None:
            found = self._numbers[token] = len(self.texts)
            self.texts.append(self._index.piece(token))
        return found

    def numbers(self, tokens: Tensor) -> np.ndarray:
        """The numbers of many tokens."""
        unique, inverse = torch.unique(tokens, return_inverse=True)
        return np.array([self.number(token) for token in unique.tolist()], dtype=np.int64)[inverse.numpy()]


def _add_logits(index: SurveyResult, head: dict[str, Any], arrays: dict[str, tuple[str, Any]], pieces: _Pieces) -> None:
    if index.raises is None or index.lowers is None:
        return
    head["logits"] = index.raises.latents.shape[1]
    for name, kept in (("raises", index.raises), ("lowers", index.lowers)):
        arrays[name] = ("u4", pieces.numbers(kept.latents))
        arrays[f"{name}By"] = ("f4", kept.similarity)


def _add_neighbours(index: SurveyResult, head: dict[str, Any], arrays: dict[str, tuple[str, Any]]) -> None:
    pairs: tuple[tuple[str, Neighbours | None], ...] = (("firesWith", index.fired_with), ("alike", index.alike))
    for name, kept in pairs:
        if kept is None:
            continue
        head["near"] = kept.latents.shape[1]
        arrays[name] = ("u4", torch.where(kept.latents < 0, NONE, kept.latents))
        arrays[f"{name}By"] = ("u1", (kept.similarity.clamp(0, 1) * 255).round())


def _add_contexts(
    index: SurveyResult,
    head: dict[str, Any],
    arrays: dict[str, tuple[str, Any]],
    pieces: _Pieces,
    contexts: int,
    sampled: int,
) -> None:
    """Lists of contexts, those of a latent after those of the one before it; and of their tokens and shades."""
    parts = [_chosen(index.best, contexts, spread=False), _chosen(index.drawn, sampled, spread=True)]
    latents = torch.cat([latent for latent, _ in parts])
    which = torch.cat([torch.full_like(latent, i) for i, (latent, _) in enumerate(parts)])
    order = (latents * 2 + which).argsort(stable=True)
    latents, which = latents[order], which[order]

    def column(name: str) -> Tensor:
        shelves = (index.best[name], index.drawn[name])
        return torch.cat([shelf[places] for shelf, places in zip(shelves, parts, strict=True)])[order]

    values, around, sequences, tokens = (column(name) for name in ("values", "around", "sequences", "tokens"))
    shown = torch.ones_like(tokens, dtype=torch.bool) if head["kind"] == "images" else tokens >= 0
    high = index.quantiles[latents, -1].abs().clamp(min=1e-30)
    shades = (around / high[:, None] * 254).ceil().clamp(0, 254)
    before = index.metadata["before"]
    pictures = [number for number in sequences.unique().tolist() if number in index.pictures]
    places = {number: place for place, number in enumerate(pictures)}
    counts = torch.bincount(latents, minlength=len(index))
    arrays |= {
        "which": ("u1", which),
        "value": ("f4", values),
        "quantileOf": ("f4", (index.quantiles[latents] < values[:, None]).double().mean(1)),
        "peak": ("u2", before - (~shown[:, :before]).sum(1)),
        "sequence": ("u4", sequences),
        "picture": ("u4", [places.get(number, NONE) for number in sequences.tolist()]),
        "first": ("u4", [0, *counts.cumsum(0).tolist()]),
        "start": ("u4", [0, *shown.sum(1).cumsum(0).tolist()]),
        "tokens": ("u4", [] if head["kind"] == "images" else pieces.numbers(tokens[shown])),
        "values": ("u1", torch.where(around.isnan(), LEFT_OUT, shades)[shown]),
    }
    head["pictures"] = [png_uri(index.pictures[number]) for number in pictures]
    if index.labels is not None:
        head["labels"] = {i: index.labels[i] for i in sequences.unique().tolist() if i < len(index.labels)}


def _chosen(shelf: dict[str, Tensor], n: int, spread: bool) -> tuple[Tensor, Tensor]:
    """(m,) latents and (m,) places of a shelf: at most n of each latent, the strongest first.

    Args:
        spread: evenly from the strongest to the weakest, instead of the strongest alone.
    """
    kept = shelf["scores"] > -float("inf")
    n = min(n, kept.shape[1])
    order = shelf["values"].masked_fill(~kept, -float("inf")).argsort(dim=1, descending=True, stable=True)
    held = kept.sum(1, keepdim=True)
    rank = torch.arange(n)[None].expand(len(kept), -1)
    wanted = rank < held
    if spread:  # the i-th of n lies i / (n - 1) of the way down
        rank = torch.where(held > n, (rank * (held - 1) / max(1, n - 1)).round().long(), rank)
    latents = torch.arange(len(kept))[:, None].expand(-1, n)[wanted]
    return latents, order.gather(1, rank.clamp(max=n - 1))[wanted]


def _effects(given: Any, index: SurveyResult) -> np.ndarray:
    """One number for each latent: from a tensor or a list, or from a ranking, 0 for latents that it does not rank."""
    n = len(index)
    if isinstance(given, Ranking):
        check_index(index, given.origin)
        found = np.zeros(n)
        found[given.latents.numpy()] = given.effect.nan_to_num().numpy()
        return found
    found = np.asarray(given, dtype=float).reshape(-1)
    if len(found) != n:
        raise ConfigError(f"effects need one number for each of {n:,} latents, got {len(found):,}")
    return found
