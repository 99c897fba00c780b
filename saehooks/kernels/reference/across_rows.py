"""Selection across rows, from blocks of scores: rows x d_sae is never kept, only what is selected so far.

These are the reference for every device. On GPUs batch top-k has kernels of its own for scores that fit in one piece;
feature choice is served from here.

Rows without a finite maximum select their argmax alone, as in the row rules. In batch top-k they take nothing from the
budget; in feature choice, where a row is known whole only at the end, what they won is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from saehooks.errors import ConfigError
from saehooks.kernels.rules import check_budget
from saehooks.support import Support, offsets_of

ScoresOfLatents = Callable[[int, int], Tensor]
"""Scores (rows, stop - start) of latents ``start .. stop - 1``."""


def batch_topk(chunks: Iterable[Tensor], total: int, rows: int, d_sae: int, device: torch.device) -> Support:
    """Select the ``total`` largest scores of all rows together, positive ones only.

    Of equal scores the first rows' are selected, in a row the lowest latents'.

    Args:
        chunks: scores (chunk, d_sae) of consecutive rows; each is done with before the next is asked for.
        total: how many entries; at most rows * d_sae.
        rows, d_sae, device: of the whole.
    Returns:
        Support; its threshold is the smallest selected score, the same for every row (infinite if none was selected).
    Raises:
        ConfigError: a budget larger than the batch.
    """
    check_budget(total, rows, d_sae)
    best: Tensor | None = None
    places = torch.zeros(0, dtype=torch.int64, device=device)
    nonfinite, start, lowest = [], 0, 0.0
    for scores in chunks:
        row_best, column = scores.max(dim=1)
        broken = ~row_best.isfinite()
        if broken.any():
            bad = broken.nonzero()[:, 0]
            nonfinite.append((bad + start) * d_sae + column[bad])
            scores[bad] = -torch.inf
        flat = scores.reshape(-1)
        here = (flat > lowest).nonzero()[:, 0]
        found = flat[here]
        if best is not None:
            found, here = torch.cat([best, found]), torch.cat([places, here + start * d_sae])
        if found.numel() > total:
            kept = largest(found, total)
            found, here = found[kept], here[kept]
            lowest = float(found.min()) if total else torch.inf
        best, places, start = found, here, start + scores.shape[0]
    if best is None or not best.numel():
        threshold = torch.full((rows,), torch.inf, device=device)
    else:
        threshold = best.min().float().expand(rows)
    return _from_places(torch.cat([places, *nonfinite]), rows, d_sae, threshold)


def largest(found: Tensor, total: int) -> Tensor:
    """(total,) ascending places of the largest of (n,) scores; of equal ones the first."""
    if not total:
        return torch.zeros(0, dtype=torch.int64, device=found.device)
    smallest = found.topk(total, sorted=False).values.min()
    places = (found >= smallest).nonzero()[:, 0]
    ties = (found[places] == smallest).nonzero()[:, 0]
    kept = torch.ones_like(places, dtype=torch.bool)
    kept[ties[ties.numel() - (places.numel() - total) :]] = False
    return places[kept]


def feature_choice(columns: ScoresOfLatents, budgets: Tensor, rows: int, block: int) -> Support:
    """Select, for each latent, the rows with the highest scores, positive ones only.

    Args:
        columns: scores of a range of latents.
        budgets: (d_sae,) int64, rows each latent takes.
        rows: how many there are.
        block: latents scored at a time.
    Returns:
        Support; its threshold is 0, since every latent has its own.
    Raises:
        ConfigError: a budget larger than the batch.
    """
    d_sae = budgets.numel()
    if d_sae and int(budgets.max()) > rows:
        raise ConfigError(f"a latent's budget of {int(budgets.max())} rows is larger than the batch of {rows}")
    places, row_best, row_column = [], None, None
    for start in range(0, d_sae, block):
        scores = columns(start, min(start + block, d_sae))
        row_best, row_column = _follow_nonfinite_rows(scores, start, row_best, row_column)
        budget = budgets[start : start + block]
        most = int(budget.max())
        if not most:
            continue
        values, order = scores.masked_fill(~scores.isfinite(), -torch.inf).topk(most, dim=0)
        taken = (torch.arange(most, device=scores.device)[:, None] < budget) & (values > 0)
        rank, column = taken.nonzero(as_tuple=True)
        places.append(order[rank, column] * d_sae + column + start)
    device = budgets.device
    found = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64, device=device)
    if row_best is not None and row_column is not None and (~row_best.isfinite()).any():
        nonfinite = (~row_best.isfinite()).nonzero()[:, 0]
        found = torch.cat([found[~torch.isin(found // d_sae, nonfinite)], nonfinite * d_sae + row_column[nonfinite]])
    return _from_places(found, rows, d_sae, torch.zeros(rows, device=device))


def _follow_nonfinite_rows(
    scores: Tensor, start: int, best: Tensor | None, column: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Row maxima over the columns so far (NaN wins) and where they are."""
    here, place = scores.max(dim=1)
    if best is None or column is None:
        return here, place
    better = (here > best) | (here.isnan() & ~best.isnan())
    return torch.where(better, here, best), torch.where(better, place + start, column)


def _from_places(places: Tensor, rows: int, d_sae: int, threshold: Tensor) -> Support:
    """Support from unordered flat places ``row * d_sae + latent``."""
    places = places.sort().values
    row = places // max(1, d_sae)
    return Support(places - row * d_sae, offsets_of(torch.bincount(row, minlength=rows)), threshold)
