"""The best places of each latent, with what stood around them, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saehooks.precision import widest

Window = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From candidates (n,), by number, to what stood around them: tokens (n, width) int32 and values (n, width)."""

EMPTY = -1


class Shelf:
    """For each latent the K places with the highest score, at most one of each sequence.

    A place is offered once, with its surroundings; only what is kept is looked up. Ties stay with who came first.
    """

    def __init__(self, d_sae: int, size: int, width: int, device: torch.device | str | None = None) -> None:
        self.size, self.width = size, width
        self.values = torch.full((d_sae, size), float("nan"), device=device)
        """(d_sae, K) the latent's value at the place."""
        self.scores = torch.full((d_sae, size), -float("inf"), dtype=widest(self.values.device), device=device)
        """(d_sae, K) descending; -inf where a place is empty."""
        self.sequences = torch.full((d_sae, size), EMPTY, dtype=torch.int64, device=device)
        """(d_sae, K) number of the sequence or image."""
        self.columns = torch.full((d_sae, size), EMPTY, dtype=torch.int32, device=device)
        """(d_sae, K) column of the place in its sequence."""
        self.tokens = torch.full((d_sae, size, width), EMPTY, dtype=torch.int32, device=device)
        """(d_sae, K, width) tokens around it, -1 beyond the text."""
        self.around = torch.full((d_sae, size, width), float("nan"), device=device)
        """(d_sae, K, width) the latent's values there, NaN where the SAE does not act."""

    def wants(self, latents: Tensor, scores: Tensor) -> Tensor:
        """(n,) bool, which candidates beat the weakest place of their latent."""
        return scores > self.scores[latents, -1] if self.size else torch.zeros_like(scores, dtype=torch.bool)

    def offer(
        self, latents: Tensor, scores: Tensor, values: Tensor, sequences: Tensor, columns: Tensor, window: Window
    ) -> None:
        """Add candidates (n,), at most one for each latent and sequence, of sequences not offered before."""
        if not len(latents):
            return
        order = torch.sort(scores, descending=True, stable=True).indices
        order = order[torch.sort(latents[order], stable=True).indices]
        which, counts = torch.unique_consecutive(latents[order], return_counts=True)
        starts = counts.cumsum(0) - counts
        group = torch.repeat_interleave(torch.arange(len(which), device=which.device), counts)
        rank = torch.arange(len(order), device=which.device) - starts[group]
        inside = rank < self.size
        new = torch.full((len(which), self.size), EMPTY, dtype=torch.int64, device=which.device)
        new[group[inside], rank[inside]] = order[inside]
        padded = torch.where(new >= 0, scores[new.clamp(min=0)], -float("inf"))
        both = torch.cat([self.scores[which], padded], 1)
        both, chosen = torch.sort(both, dim=1, descending=True, stable=True)
        self.scores[which], chosen = both[:, : self.size], chosen[:, : self.size]
        incoming = (chosen >= self.size) & (both[:, : self.size] > -float("inf"))
        taken = new.gather(1, (chosen - self.size).clamp(min=0))[incoming]
        old = chosen.clamp(max=self.size - 1)
        tokens, around = window(taken)
        fresh = {
            "values": values[taken].float(),
            "sequences": sequences[taken],
            "columns": columns[taken].int(),
            "tokens": tokens,
            "around": around.float(),
        }
        for name, rows in fresh.items():
            table = getattr(self, name)
            before = table[which]
            index = old if before.dim() == 2 else old[:, :, None].expand(-1, -1, self.width)
            moved = before.gather(1, index)
            moved[incoming] = rows
            table[which] = moved

    def state(self) -> dict[str, Tensor]:
        """Everything kept, as tensors of the shapes of the attributes."""
        return {name: getattr(self, name) for name in ("scores", "values", "sequences", "columns", "tokens", "around")}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`, of the same shapes."""
        for name, tensor in state.items():
            setattr(self, name, tensor.to(self.scores.device))


def best_of_each(groups: Tensor, scores: Tensor) -> Tensor:
    """(m,) int64, for each distinct group the number of its entry with the highest score, the first among equals.

    >>> best_of_each(torch.tensor([7, 7, 3]), torch.tensor([1.0, 2.0, 0.0])).tolist()
    [2, 1]
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    order = order[torch.sort(groups[order], stable=True).indices]
    ordered = groups[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return order[first]


def lottery(latents: Tensor, sequences: Tensor, columns: Tensor) -> Tensor:
    """(n,) float64 in [0, 1), a number drawn for each place: the same whenever and in whatever order it comes.

    The places with the highest numbers are a uniform sample of all places.
    """
    mixed = latents * -7046029254386353131 + sequences * -4658895280553007687 + columns * 7460724058829297151 + 1
    for multiplier, shift in ((-4658895280553007687, 30), (-7723592293110705685, 27), (7046029254386353133, 31)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    dtype = widest(mixed.device)
    bits = 53 if dtype == torch.float64 else 24
    return ((mixed >> (64 - bits)) & ((1 << bits) - 1)).to(dtype) / (1 << bits)
