"""A dictionary of some of the latents, joined with those of other ranks where all latents or all rows meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from saehooks.dictionaries import Dictionary, Prepared
from saehooks.kernels import DEFAULT, BatchTopK, Entmax, FeatureChoice, Sparsemax, Step, Support, TopK
from saehooks.ranks.grid import Ranks
from saehooks.ranks.products import largest_of_rows, newton_threshold, sum_of_gradients, sum_of_parts
from saehooks.support import offsets_of


class ShardedDictionary(Dictionary):
    """Mixed into a dictionary of this rank's latents: selection and sums are those of all latents and all rows.

    Of nothing of the size of rows x d_sae or d_sae x d_in is ever sent: per row two sums for each Newton step of a
    threshold, or k candidates; for a batch its budget of candidates; one (rows, d) sum of the reconstruction and one
    of the queries' gradient.
    """

    ranks: Ranks

    def total(self, latents: int) -> int:
        count = torch.tensor(latents, dtype=torch.int64, device=self.table.device)
        return int(self.ranks.over_latents(count))

    def shared(self, tensor: Tensor) -> Tensor:
        return sum_of_gradients(tensor, self.ranks)

    def whole(self, sums: Tensor) -> Tensor:
        return sum_of_parts(sums, self.ranks)

    def for_refinement(self, rows: int, steps: int) -> Dictionary:
        """Where latents are shared out, what own ones alone make has only a part of a shared matrix's gradient."""
        return self if self.ranks.latents > 1 else super().for_refinement(rows, steps)

    def refined(
        self, target: Tensor, values: Tensor, rate: Tensor, support: Support, *, step: Step = DEFAULT
    ) -> Tensor | None:
        """Of no use here: between its two products the sums of all ranks meet."""
        return None

    def select(
        self,
        prepared: Prepared,
        rule: Any,
        *,
        among: Tensor | None = None,
        silenced: Tensor | None = None,
        step: Step = DEFAULT,
    ) -> Support:
        """As of one process: own latents by the rule, less those that the threshold of all leaves out."""
        latents, rows = self.d_sae if among is None else among.numel(), prepared.queries.shape[0]
        if latents:
            own = self._own_rule(rule, rows, latents)
            support = super().select(prepared, own, among=among, silenced=silenced, step=step.exact())
        else:
            support = self._nothing(prepared)
        if not isinstance(rule, (Sparsemax, Entmax, TopK, BatchTopK, FeatureChoice)):
            return support
        known = self._known(prepared, support, silenced, step)
        if isinstance(rule, (Sparsemax, Entmax)):
            alpha = rule.alpha if isinstance(rule, Entmax) else 2.0
            threshold = newton_threshold(known, support.rows, support.threshold, alpha, self.ranks).to(known.dtype)
            keep = ~(known <= threshold[support.rows])  # keeps NaN, so that a broken row stays visible
        elif isinstance(rule, TopK):
            threshold, keep = largest_of_rows(known, support, rule.k, rule.k, self.ranks)
        elif isinstance(rule, BatchTopK):
            threshold, keep = self._largest_of_batch(known, support, rule.k * rows * self.ranks.data)
        else:
            threshold, keep = support.threshold, self._largest_of_latents(known, support, rule.budgets)
        chosen = _kept(support, keep, threshold).trusted(self.d_sae)
        return chosen if silenced is not None else chosen.with_scores(known[keep])

    def select_ranked(
        self, prepared: Prepared, k: int, rank: Callable[[Tensor], Tensor], silenced: Tensor | None = None
    ) -> Support:
        support = super().select_ranked(prepared, min(k, self.d_sae), rank, silenced)
        known = rank(self._known(prepared, support, silenced, DEFAULT))
        keep = largest_of_rows(known, support, k, k, self.ranks, lowest=-torch.inf)[1]
        return _kept(support, keep, support.threshold).trusted(self.d_sae)

    def _own_rule(self, rule: Any, rows: int, latents: int) -> Any:
        """What surely selects all of the own latents and rows that the rule selects of all."""
        if isinstance(rule, TopK):
            return TopK(min(rule.k, latents))
        if isinstance(rule, BatchTopK):
            return BatchTopK(min(rule.k * self.ranks.data, latents))
        return FeatureChoice(rule.budgets.clamp(max=rows)) if isinstance(rule, FeatureChoice) else rule

    def _nothing(self, prepared: Prepared) -> Support:
        """The support of a rank that has none of the latents to choose from."""
        rows, empty = prepared.queries.shape[0], prepared.queries.new_zeros(0)
        none = torch.zeros(0, dtype=torch.int64, device=empty.device)
        lowest = prepared.queries.new_full((rows,), -torch.inf)
        return Support(none, none.new_zeros(rows + 1), lowest, empty).trusted(self.d_sae)

    @torch.no_grad()
    def _known(self, prepared: Prepared, support: Support, silenced: Tensor | None, step: Step) -> Tensor:
        """(nnz,) scores as the rule saw them."""
        known = support.scores if support.scores is not None else super().scores(prepared, support, step=step)
        return known if silenced is None else known.masked_fill(silenced[support.indices], 0.0)

    def _largest_of_batch(self, scores: Tensor, support: Support, budget: int) -> tuple[Tensor, Tensor]:
        """Threshold and own entries of the largest positive scores of all rows; of equal ones the first."""
        table, positive = scores.new_full((budget,), -torch.inf), scores[scores > 0][:budget]
        table[: len(positive)] = positive
        joined = torch.cat(self.ranks.gathered_all(table))
        positive = joined[joined > 0]
        if len(positive) <= budget:
            smallest = positive.min() if len(positive) else joined.new_tensor(torch.inf)
            return smallest.expand(support.n_rows), scores > 0
        smallest = positive.topk(budget, sorted=False).values.min()
        keep, tied = scores > smallest, scores == smallest
        room, equal = budget - int((joined > smallest).sum()), (joined == smallest).reshape(self.ranks.size, -1).sum(1)
        if int(equal.sum()) <= room:
            return smallest.expand(support.n_rows), keep | tied
        # Where they are in the batch of one process decides, so they have to say.
        ranks = self.ranks
        row = support.rows[tied] * ranks.data + ranks.data_rank
        place = row * (self.d_sae * ranks.latents) + ranks.latent_rank * self.d_sae + support.indices[tied]
        places = place.new_full((int(equal.max()),), torch.iinfo(torch.int64).max)
        places[: len(place)] = place
        last = torch.cat(ranks.gathered_all(places)).sort().values[room - 1]
        keep[tied] = place <= last
        return smallest.expand(support.n_rows), keep

    def _largest_of_latents(self, scores: Tensor, support: Support, budgets: Tensor) -> Tensor:
        """Own entries among the rows of all ranks that score highest for each own latent, as many as its budget."""
        if self.ranks.data == 1:
            return torch.ones_like(scores, dtype=torch.bool)
        most = int(self.ranks.over_rows(torch.tensor(len(scores), device=scores.device), dist.ReduceOp.MAX))
        latents = torch.full((most,), self.d_sae, dtype=torch.int32, device=scores.device)
        values = scores.new_full((most,), -torch.inf)
        latents[: len(scores)], values[: len(scores)] = support.indices.int(), scores
        latent = torch.cat(self.ranks.gathered_rows(latents)).long()
        value = torch.cat(self.ranks.gathered_rows(values))
        order = value.argsort(descending=True, stable=True)
        order = order[latent[order].argsort(stable=True)]
        first = torch.searchsorted(latent[order], torch.arange(self.d_sae + 1, device=scores.device))
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device) - first[latent[order]]
        own = place[self.ranks.data_rank * most :][: len(scores)]
        return own < budgets[support.indices]


def _kept(support: Support, keep: Tensor, threshold: Tensor) -> Support:
    """The entries that are kept, without scores."""
    sizes = torch.zeros(support.n_rows, dtype=torch.int64, device=keep.device)
    sizes.index_add_(0, support.rows, keep.long())
    return Support(support.indices[keep], offsets_of(sizes), threshold)
