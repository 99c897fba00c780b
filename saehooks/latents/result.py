"""What a survey found: the figures of every latent, the places where it fires, and what stands there."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import index as whole
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saehooks.errors import ConfigError, LatentError
from saehooks.latents.cofiring import Neighbours
from saehooks.latents.tallies import GRID
from saehooks.show.values import visible


class Context(NamedTuple):
    """A place where a latent fires, with what stands around it."""

    sequence: int
    """Number of the sequence, or image, in the data."""
    column: int
    """Column of the place in its sequence."""
    peak: int
    """Place in ``tokens`` and ``values``."""
    value: float
    """The latent's value at the place."""
    quantile: float
    """Share of the latent's values that are smaller."""
    tokens: list[int] | None
    """Around the place; None for images."""
    values: list[float]
    """The latent's value at each, NaN where the SAE does not act."""
    picture: Tensor | None = None
    """(3, height, width) uint8, for images."""


@dataclass(eq=False, repr=False)
class SurveyResult:
    """What one `survey` found of every latent of an SAE. A `LatentIndex` searches, shows and saves it."""

    metadata: dict[str, Any]
    """site, written, head, model, where, sae, fingerprint, grid, before: what the survey was of."""
    sequences: int
    """Sequences, or images, read."""
    positions: int
    """Positions looked at: those where the SAE acts."""
    complete: bool
    """False when an interrupt ended the survey early."""
    counts: Tensor
    """(d_sae,) int64, positions at which each latent was selected."""
    mean: Tensor
    """(d_sae,) float64, mean value where selected; NaN for a dead latent."""
    quantiles: Tensor
    """(d_sae, 101) float32, the 0, 1, ... 100% quantiles of the values where selected; NaN for a dead latent."""
    best: dict[str, Tensor]
    """The strongest places of each latent, as `saehooks.latents.shelf.Shelf` keeps them."""
    drawn: dict[str, Tensor]
    """Places drawn at random from all where it fires."""
    raises: Neighbours | None = None
    """Tokens whose logits a latent's direction raises most: (d_sae, n) ids, and the change by one unit of it."""
    lowers: Neighbours | None = None
    """Tokens whose logits it lowers most."""
    fired_with: Neighbours | None = None
    """Latents that fire at the same positions."""
    alike: Neighbours | None = None
    """Latents whose directions point the same way."""
    pictures: dict[int, Tensor] = field(default_factory=dict)
    """Small images (3, height, width) uint8 by number, of the places kept."""
    labels: list[str] | None = None
    """Of the images, in order."""
    pieces: dict[int, str] = field(default_factory=dict)
    """Tokens as text, by id."""
    names: dict[int, str] = field(default_factory=dict)
    """Names that people gave to latents; see `name`."""

    # ------------------------------------------------------------- figures

    def __len__(self) -> int:
        """Number of latents."""
        return len(self.counts)

    @property
    def site(self) -> str:
        """Name of the site."""
        return self.metadata["site"]

    @property
    def density(self) -> Tensor:
        """(d_sae,) float64, share of the positions at which each latent was selected."""
        return self.counts.double() / max(1, self.positions)

    @property
    def dead(self) -> Tensor:
        """(n,) int64, the latents that were never selected."""
        return (self.counts == 0).nonzero()[:, 0]

    def quantile(self, latent: int, q: float) -> float:
        """A quantile of a latent's values where it was selected, within 2.2% of itself (exact at 0 and 1).

        Raises:
            LatentError: out of range, or dead: then it has no values.
        """
        latent = self._number(latent)
        if not 0 <= q <= 1:
            raise ConfigError(f"a quantile lies in 0 .. 1, got {q}")
        if not int(self.counts[latent]):
            raise LatentError(f"latent {latent} never fired in this survey of {self.positions:,} positions")
        place = q * (GRID - 1)
        low = min(int(place), GRID - 2)
        row = self.quantiles[latent].double()
        return float(row[low] + (place - low) * (row[low + 1] - row[low]))

    def typical(self, latent: int, q: float = 0.5) -> float:
        """How strong a latent usually is where it fires: the median of its values, or another quantile.

        A scale for `sh.clamp` and `sh.steer`: the 95% quantile is strong but still ordinary.

        Raises:
            LatentError: out of range, or dead.
        """
        return self.quantile(latent, q)

    # --------------------------------------------------------------- words

    def name(self, latent: int, name: str) -> None:
        """Give a latent a name of yours, which reprs, search and pages show; an empty one takes it back."""
        latent = self._number(latent)
        if name:
            self.names[latent] = str(name)
        else:
            self.names.pop(latent, None)

    def words(self, latent: int, n: int = 5) -> str:
        """A latent in a few words: its name; else the different tokens, or image labels, where it is strongest."""
        latent = self._number(latent)
        if latent in self.names:
            return self.names[latent]
        words = [word for word in self._peaks(latent) if word]
        if self.labels is not None:  # the kind of image that is most frequent comes first
            words.sort(key=lambda word: -words.count(word))
        return " ".join(list(dict.fromkeys(words))[:n])

    def _peaks(self, latent: int) -> list[str]:
        """The token, or image label, of each of the strongest places, the strongest first."""
        kept = self.best["scores"][latent] > -float("inf")
        if self.metadata["grid"] is not None:
            numbers = self.best["sequences"][latent][kept].tolist() if self.labels else []
            return [self.labels[i] for i in numbers if i < len(self.labels)]  # type: ignore[index, arg-type]
        tokens = self.best["tokens"][latent, :, self.metadata["before"]][kept]
        return [visible(self.piece(token)) for token in tokens.tolist()]

    def word(self, context: Context) -> str:
        """The token at a place, its spaces visible; for an image its label."""
        if context.tokens is not None:
            return visible(self.piece(context.tokens[context.peak]))
        return self.labels[context.sequence] if self.labels and context.sequence < len(self.labels) else ""

    def piece(self, token: int) -> str:
        """A token as text."""
        return "" if token < 0 else self.pieces.get(token, f"<{token}>")

    def contexts(self, latent: int, sampled: bool = False) -> list[Context]:
        """Places where a latent fires, the strongest first.

        Args:
            sampled: those drawn at random from all where it fires, instead of the strongest.
        """
        latent = self._number(latent)
        shelf = self.drawn if sampled else self.best
        kept = (shelf["scores"][latent] > -float("inf")).nonzero()[:, 0]
        kept = kept[shelf["values"][latent][kept].argsort(descending=True, stable=True)]
        return [self._context(shelf, latent, int(place)) for place in kept]

    def _context(self, shelf: dict[str, Tensor], latent: int, place: int) -> Context:
        value = float(shelf["values"][latent, place])
        sequence, column = int(shelf["sequences"][latent, place]), int(shelf["columns"][latent, place])
        values = shelf["around"][latent, place]
        quantile = float((self.quantiles[latent] < value).double().mean())
        if self.metadata["grid"] is not None or sequence in self.pictures:
            return Context(
                sequence, column, column, value, quantile, None, values.tolist(), self.pictures.get(sequence)
            )
        tokens, peak = shelf["tokens"][latent, place], self.metadata["before"]
        kept = tokens >= 0
        skipped = int((~kept[:peak]).sum())
        return Context(sequence, column, peak - skipped, value, quantile, tokens[kept].tolist(), values[kept].tolist())

    def _number(self, latent: Any) -> int:
        """A latent's number, whatever kind of whole number it was given as."""
        if isinstance(latent, str):
            raise LatentError(f"latents have numbers; to find one by a word write index.search({latent!r})")
        try:
            number = whole(latent)
        except TypeError:
            number = None
        if number is None or isinstance(latent, bool):
            raise LatentError(f"give the number of one latent, as in index[901]; got {latent!r}")
        if not 0 <= number < len(self):
            raise LatentError(f"latent {number} is out of range: this SAE has latents 0 to {len(self) - 1}")
        return number

    def text(self, context: Context) -> str:
        """The text of a context."""
        return "".join(map(self.piece, context.tokens or ()))

    def read_pieces(self, tokenizer: Any) -> None:
        """Write down the text of every token that the index shows."""
        kept = [self.best["tokens"], self.drawn["tokens"]]
        kept += [one.latents for one in (self.raises, self.lowers) if one is not None]
        ids = torch.cat([one.reshape(-1).long() for one in kept]).unique().tolist()
        decode = str if tokenizer is None else lambda token: tokenizer.decode([token])
        self.pieces = {token: decode(token) for token in ids if token >= 0}

    # -------------------------------------------------------------- tables

    def row(self, latent: int) -> dict[str, Any]:
        """One latent as a plain dict: density, typical value and words."""
        fires = int(self.counts[latent]) > 0
        return {
            "latent": latent,
            "words": self.words(latent),
            "density": int(self.counts[latent]) / max(1, self.positions),
            "typical": self.typical(latent) if fires else None,
            "largest": float(self.quantiles[latent, -1]) if fires else None,
        }

    def rows(self) -> list[dict[str, Any]]:
        """All latents as plain dicts."""
        return [self.row(latent) for latent in range(len(self))]
