"""What is latent 901? An index of what every latent of an SAE stands for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saehooks.attachments import read
from saehooks.causal.words import Origin, check_index
from saehooks.codes import Codes
from saehooks.errors import ConfigError
from saehooks.hosts import host as host_of
from saehooks.latents.cofiring import Neighbours
from saehooks.latents.folder import read_tensors, write_index
from saehooks.latents.latent import Latent
from saehooks.latents.listing import Listing, TokenListing
from saehooks.latents.result import SurveyResult
from saehooks.latents.tallies import GRID
from saehooks.latents.views import index_html, strongest_html
from saehooks.sae import SAE, SparseCoder
from saehooks.show.values import Markup, visible
from saehooks.streams import prompt_tokens
from saehooks.trace import Forward
from saehooks.where import parse

SHELF = ("scores", "values", "sequences", "columns", "tokens", "around")
PLAIN = ("metadata", "sequences", "positions", "complete", "labels")
NEIGHBOURS = ("raises", "lowers", "fired_with", "alike")
WEIGHTS = {"name": 8.0, "peak": 4.0, "raises": 2.0, "label": 4.0, "context": 1.0}
"""What a hit of `LatentIndex.search` counts for, by where it was found."""


@dataclass(eq=False, repr=False)
class LatentIndex(SurveyResult):
    """What every latent of an SAE stands for, over the data of one `survey`.

    ``index[901]`` is one latent; `search`, `like` and `top` find latents; `typical` is how strong one usually is.
    """

    tokenizer: Any = field(default=None, init=False)
    """What turns a text into tokens for `top`; None for a loaded index until `bind`."""
    _model: Any = field(default=None, init=False)
    _sae: Any = field(default=None, init=False)
    _where: Any = field(default=None, init=False)
    _texts: dict[int, list[tuple[str, str | None, float]]] = field(default_factory=dict, init=False)

    def __new__(cls, *given: Any, **parts: Any) -> LatentIndex:
        if given and isinstance(given[0], (str, Path)):
            raise ConfigError(f"an index is read by LatentIndex.load({str(given[0])!r})")
        return super().__new__(cls)

    # ------------------------------------------------------------- latents

    def __getitem__(self, latent: int) -> Latent:
        """Everything known of one latent.

        Raises:
            LatentError: out of range, or no whole number.
        """
        return Latent(self, self._number(latent))

    def __iter__(self) -> Iterator[Latent]:
        return (Latent(self, latent) for latent in range(len(self)))

    # ------------------------------------------------------------- finding

    def search(self, text: str, n: int = 20) -> Listing:
        """Latents by what they stand for: words at and around their strongest places, tokens their direction raises,
        image labels, and the names you gave.

        Args:
            text: a word or several; upper and lower case are the same. Every word must be found.
            n: at most so many.
        """
        words = [re.escape(word) for word in text.lower().split()] if isinstance(text, str) else []
        if not words:
            raise ConfigError("give a word to search for, as in index.search('music')")
        scores: dict[int, tuple[float, str]] = {}
        for latent in range(len(self)):
            found = [self._hits(latent, re.compile(word)) for word in words]
            if all(score for score, _ in found):
                scores[latent] = sum(score for score, _ in found), next(where for _, where in found)
        best = sorted(scores, key=lambda latent: (-scores[latent][0], latent))[:n]
        rows = [{**self.row(latent), "found": scores[latent][1]} for latent in best]
        return Listing(f"{len(scores):,} latents of {self.site} with {text!r}", rows, self)

    def _hits(self, latent: int, word: re.Pattern[str]) -> tuple[float, str]:
        """How much a latent has to do with a word, and where it was first found."""
        found: dict[str, float] = {}
        if word.search(self.names.get(latent, "").lower()):
            found["name"] = WEIGHTS["name"]
        for peak, text, share in self._said(latent):
            kind = "label" if text is None else "peak"
            if word.search(peak):
                found[kind] = found.get(kind, 0) + WEIGHTS[kind] * share
            elif text is not None and word.search(text):
                found["context"] = found.get("context", 0) + WEIGHTS["context"] * share
        if self.raises is not None:
            hits = sum(bool(word.search(self.piece(token).lower())) for token in self.raises.latents[latent].tolist())
            if hits:
                found["raises"] = WEIGHTS["raises"] * hits / self.raises.latents.shape[1]
        return sum(found.values()), next(iter(found), "")

    def _said(self, latent: int) -> list[tuple[str, str | None, float]]:
        """In small letters: what stands at each of the strongest places, around it (None for images), and its weight.

        The weight is a place's share of the strength of all of them, less for a latent with few.
        """
        if latent not in self._texts:
            kept = self.best["scores"][latent] > -float("inf")
            peaks = [peak.lower() for peak in self._peaks(latent)]
            strength = self.best["values"][latent][kept].clamp(min=0).double()
            share = strength / strength.sum().clamp(min=1e-30) * float(kept.double().mean()) ** 0.5
            texts: list[str | None] = [None] * len(peaks)
            if self.metadata["grid"] is None:
                rows = self.best["tokens"][latent][kept].tolist()
                texts = ["".join(map(self.piece, row)).lower() for row in rows]
            self._texts[latent] = list(zip(peaks, texts, share.tolist(), strict=False))
        return self._texts[latent]

    def like(self, latent: int, n: int = 10) -> Listing:
        """Latents like one: those whose directions point the same way, and those that fire at the same positions.

        Returns:
            Rows with both similarities, each a cosine; None where a latent is not among the nearest kept of that kind.
        """
        latent = self._number(latent)
        kinds = {"direction": self.alike, "fires with": self.fired_with}
        found: dict[int, dict[str, float]] = {}
        for kind, kept in kinds.items():
            if kept is None:
                continue
            for other, similarity in zip(kept.latents[latent].tolist(), kept.similarity[latent].tolist(), strict=True):
                if other >= 0:
                    found.setdefault(other, {})[kind] = similarity
        best = sorted(found, key=lambda other: (-max(found[other].values()), other))[:n]
        rows = [{**self.row(other), **{kind: found[other].get(kind) for kind in kinds}} for other in best]
        return Listing(f"latents like {latent} ({self.words(latent)})", rows, self)

    def top(self, text: Any, n: int = 10, *, by: str = "value") -> Listing:
        """The latents that are strongest in a text.

        Args:
            text: a text, tokens (pos,) or (1, pos), an image (1, 3, height, width), or a trace that was recorded.
            n: at most so many.
            by: ``"value"``; or ``"rarity"``, for those that seldom fire so strongly elsewhere; latents that never fired
                in the survey, of which it can say nothing, come last.
        Raises:
            ConfigError: the index was loaded and knows no model: call `bind` first; or a trace of another SAE.
        """
        if by not in ("value", "rarity"):
            raise ConfigError(f"by={by!r}; expected 'value' or 'rarity'")
        forward = text if isinstance(text, Forward) else self._read(text)
        check_index(self, Origin(forward.site, forward.head, forward.sae.fingerprint()))
        codes = _inside(forward)
        largest = torch.full((len(self),), -float("inf")).scatter_reduce_(
            0, codes.indices.cpu(), codes.values.detach().float().cpu(), "amax"
        )
        fired = (largest > -float("inf")).nonzero()[:, 0]
        above = (self.quantiles[fired] >= largest[fired, None]).double().mean(1)  # NaN, a dead one, compares as False
        share = self.density[fired] * above.clamp(min=1 / GRID)
        share[self.counts[fired] == 0] = float("inf")
        order = (-largest[fired] if by == "value" else share).argsort(stable=True)[:n]
        places = {int(fired[i]): float(largest[fired[i]]) for i in order}
        rows = [{**self.row(latent), "value": value, "at": _peak(forward, latent)} for latent, value in places.items()]
        return Listing(f"strongest latents at {self.site}", rows, self)

    def of_trace(self, forward: Forward, k: int = 5) -> TokenListing:
        """The k strongest latents of each token of a trace, with what they stand for: ``trace.top(5, index=index)``."""
        check_index(self, Origin(forward.site, forward.head, forward.sae.fingerprint()))
        return TokenListing(self, forward, k)

    def _read(self, given: Any) -> Forward:
        model, sae = self._bound()
        host = host_of(model)
        if isinstance(given, str):
            given = prompt_tokens(self.tokenizer, given)
        if isinstance(given, Tensor) and given.dim() in (1, 3):
            given = given[None]
        where = self._where
        written = self.metadata["written"]
        at = self.site if written == self.site else (self.site, written)
        options = {"at": at, "head": self.metadata["head"], **({} if where is None else {"where": where})}
        with torch.no_grad(), read(model, sae, **options) as trace, host.stop_at(host.site(written)):
            host.run(host.to_device(given))
        return trace

    # ------------------------------------------------------------- showing

    def __repr__(self) -> str:
        dead = len(self.dead)
        partial = "" if self.complete else ", interrupted, partial"
        kind = "images" if self.metadata["grid"] is not None else "sequences"
        return (
            f"LatentIndex('{self.site}', {len(self):,} latents, {dead:,} dead, {self.positions:,} positions of "
            f"{self.sequences:,} {kind}{partial})\n  index[901], index.search('music'), index.like(901), "
            "index.typical(901), index.top('a text'), index.page('latents.html')"
        )

    def _repr_html_(self) -> str:
        return index_html(self)

    def context_html(self, latent: int) -> Markup:
        """Where a latent is strongest, as HTML for a cell of a table: shaded tokens, or images with their patches."""
        return strongest_html(self, self._number(latent))

    def page(self, file: str | Path, **options: Any) -> Path:
        """Write one self-contained HTML page of all latents, to search, sort and click through; it works offline.

        Args:
            file: where to write it.
            options: ``title``; ``contexts`` and ``sampled``, how many of each to carry; ``effects``, a number for
                each latent (a tensor, or a `Ranking`) to sort by; ``limit``, bytes that the page may have, for which
                it carries fewer contexts if need be (30 MB).
        Returns:
            The file.
        """
        from saehooks.latents.page import write_page

        return write_page(self, file, **options)

    # --------------------------------------------------------------- files

    def save(self, folder: str | Path) -> None:
        """Write the index to a folder, as safetensors and JSON; a crash at any moment leaves the old one or the new."""
        tensors = {"counts": self.counts, "mean": self.mean, "quantiles": self.quantiles}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"drawn.{name}": tensor for name, tensor in self.drawn.items()}
        for name in NEIGHBOURS:
            kept = getattr(self, name)
            if kept is not None:
                tensors |= {f"{name}.latents": kept.latents, f"{name}.similarity": kept.similarity}
        tensors |= {f"picture.{number}": image for number, image in self.pictures.items()}
        plain = {name: getattr(self, name) for name in PLAIN}
        texts = {name: {str(key): text for key, text in getattr(self, name).items()} for name in ("pieces", "names")}
        write_index(folder, {**plain, **texts}, tensors)

    @classmethod
    def load(cls, folder: str | Path) -> LatentIndex:
        """Read an index back.

        Raises:
            FormatError: there is none, or it is damaged.
        """
        found, tensors = read_tensors(folder)

        def neighbours(name: str) -> Neighbours | None:
            if f"{name}.latents" not in tensors:
                return None
            return Neighbours(tensors[f"{name}.latents"], tensors[f"{name}.similarity"])

        parts: dict[str, Any] = {name: found[name] for name in PLAIN}
        parts |= {name: tensors[name] for name in ("counts", "mean", "quantiles")}
        parts |= {shelf: {name: tensors[f"{shelf}.{name}"] for name in SHELF} for shelf in ("best", "drawn")}
        parts |= {name: neighbours(name) for name in NEIGHBOURS}
        parts["pictures"] = {int(name[8:]): tensors[name] for name in tensors if name.startswith("picture.")}
        parts |= {name: {int(key): text for key, text in found[name].items()} for name in ("pieces", "names")}
        return cls(**parts)

    # --------------------------------------------------------------- model

    def bind(self, model: Any, sae: SAE, tokenizer: Any = None, where: Any = None) -> LatentIndex:
        """Tell a loaded index its model and SAE, which `top` needs to read new texts.

        Args:
            tokenizer: by default the model's own.
            where: the positions to look at; by default those of the survey, or, where these were a mask or a function,
                where the SAE was trained.
        Raises:
            ConfigError: another SAE than the one surveyed.
        """
        self.check(sae)
        self._model, self._sae = model, sae
        self._where = parse(self.metadata["where"]) if where is None else where
        self.tokenizer = tokenizer or host_of(model).tokenizer
        return self

    def check(self, sae: SparseCoder) -> None:
        """Refuse an SAE other than the one surveyed: the words would be those of other latents.

        Raises:
            ConfigError: another SAE, or the same after more training or in another precision.
        """
        if not isinstance(sae, SparseCoder):
            raise ConfigError(f"expected the SAE that was surveyed, got {type(sae).__name__}")
        self.check_fingerprint(sae.fingerprint())

    def check_fingerprint(self, fingerprint: str) -> None:
        """Refuse the `SAE.fingerprint` of another SAE than the one surveyed.

        Raises:
            ConfigError: as `check`.
        """
        if fingerprint != self.metadata["fingerprint"]:
            raise ConfigError(
                f"this index is of another SAE: it was made with {self.metadata['sae']}, or with this one before more "
                "training or in another precision; sh.survey(model, sae, batches) makes one of this SAE"
            )

    def _bound(self) -> tuple[Any, SAE]:
        if self._model is None:
            raise ConfigError("this index was loaded from a folder: write index.bind(model, sae) first, to read a text")
        return self._model, self._sae


def _inside(forward: Forward) -> Codes:
    """The codes at the positions where the SAE acts."""
    return forward.codes if forward.mask is None else forward.codes[forward.mask]


def _peak(forward: Forward, latent: int) -> str:
    """The token at which a latent is strongest."""
    values = forward.codes.of(latent).detach()
    if forward.mask is not None:
        values = values.masked_fill(~forward.mask.to(values.device), -float("inf"))
    row, column = divmod(int(values.argmax()), values.shape[1])
    return visible(forward.token_strings(row)[column])
