"""Which latents fire on which tokens, over a stretch of real text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from saehooks.codes import Codes
from saehooks.sae import SAE
from saehooks.show.values import visible
from saehooks.streams import harvest


class Survey:
    """Codes of many tokens at the SAE's site, position 0 of each sequence left out.

    Args:
        model: a language model.
        sae: an SAE that knows its site.
        batches: (batch, pos) token tensors.
        tokenizer: to write tokens as text.
    """

    def __init__(self, model: Any, sae: SAE, batches: Iterable[Tensor], tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        batches = list(batches)
        self.tokens = torch.cat([batch[:, 1:].reshape(-1) for batch in batches])
        """(n,) int64, the tokens, in the order of the codes."""
        rows, encoder = harvest(model, batches, sae.hook_name or ""), sae.frozen()
        with torch.no_grad():
            self.codes = Codes.cat([encoder.encode(part) for part in rows])
        """Codes of shape (n,)."""

    def places(self, latent: int, n: int = 6) -> list[int]:
        """Where a latent is strongest, at most one place for each different token."""
        values = self.codes.of(latent)
        found: dict[int, int] = {}
        for place in values.argsort(descending=True)[: 20 * n].tolist():
            if values[place] <= 0 or len(found) == n:
                break
            found.setdefault(int(self.tokens[place]), place)
        return list(found.values())

    def words(self, latent: int, n: int = 6) -> str:
        """The different tokens on which a latent is strongest, as one line of text."""
        return " ".join(visible(self._text([int(self.tokens[place])])) for place in self.places(latent, n))

    def context(self, place: int, before: int = 8, after: int = 3) -> str:
        """The words around a place, the place itself in brackets."""
        start = max(0, place - before)
        left, at = self.tokens[start:place].tolist(), [int(self.tokens[place])]
        right = self.tokens[place + 1 : place + 1 + after].tolist()
        return f"…{self._text(left)}[{self._text(at)}]{self._text(right)}…".replace("\n", " ")

    def contrast(self, codes: Codes) -> Tensor:
        """(d_sae,) by how much more often each latent fires in other codes than here, in standard errors."""
        here, there = self.codes, codes
        n, m = here.sizes.numel(), there.sizes.numel()
        p, q = here.counts() / n, there.counts() / m
        pooled = (here.counts() + there.counts()) / (n + m)
        return (q - p) / (pooled * (1 - pooled) * (1 / n + 1 / m)).clamp_min(1e-12).sqrt()

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def typical(codes: Codes, latent: int) -> float:
    """A strong but ordinary value of a latent: the 95% quantile of its positive values; 0 if it has none."""
    values = codes.values[codes.indices == latent]
    values = values[values > 0]
    return float(values.quantile(0.95)) if values.numel() else 0.0
