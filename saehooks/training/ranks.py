"""Several processes, started by ``torchrun``, that train one SAE together.

They form a grid of data x latents. Ranks that share latents split the rows of each batch and average their gradients.
Ranks that share rows split the dictionary: each scores, selects and decodes its own latents. Of those nothing of the
size of tokens x d_sae or d_sae x d_in is ever sent in a step: per row two sums for each Newton step of a threshold (or
k candidates for top-k), one (rows, d) sum of the reconstruction, and one (rows, d) sum of the queries' gradient.

Split by latents, a training is that of one process up to the order of float sums. Split by rows it is so for losses
that are means over rows; terms that are ratios of sums (``mse``, aux_k, l0_target) and batch top-k are taken of each
rank's rows, as is usual in data-parallel training.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from saehooks.codes import Codes
from saehooks.dictionaries import Dictionary, Prepared
from saehooks.errors import ConfigError
from saehooks.kernels import DEFAULT, BatchTopK, Entmax, Sparsemax, Step, Support, TopK
from saehooks.sae import SAE
from saehooks.support import offsets_of

SHARDED = {
    "dictionary": ("concepts", "linear"),
    "activation": ("relu", "gated", "jumprelu", "topk", "batchtopk", "sparsemax", "entmax"),
}
"""Cells of the grid whose dictionary can be split over ranks."""
NEWTON_STEPS = 64
"""More than any threshold needs: each step takes at least one score out of the support."""


class Alone:
    """One process: nothing to split, nothing to send."""

    size = rank = data = latents = 1
    rank = data_rank = latent_rank = 0
    sent = 0
    """Bytes that this rank gave to collectives."""

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def own(self, batch: Tensor) -> Tensor:
        """The rows (n, d_in) of a batch (rows, d_in) that this rank trains on."""
        return batch

    def any(self, flag: Tensor) -> Tensor:
        """() the largest of all ranks."""
        return flag

    def average_gradients(self, module: nn.Module) -> None:
        """Over the ranks that share latents."""

    def merge_statistics(self, statistics: list[tuple[Tensor, Tensor]]) -> None:
        """Running statistics, pairs (now, before) of one shape, become those of all ranks' rows, in place."""

    def sum_latents(self, number: float) -> float:
        """A number that was counted over own latents, over all; averaged over the rows of all ranks."""
        return number

    def mean_rows(self, number: float) -> float:
        """A mean over own rows, over all."""
        return number

    def least(self, counts: Tensor) -> None:
        """Each entry of a tensor, of any shape, becomes the smallest of the ranks that share latents, in place."""

    def check_agreement(self, sae: SAE, facts: dict[str, Any]) -> None:
        """Every rank must be asked for the same training; the weights are those of rank 0."""

    def shard(self, sae: SAE) -> SAE:
        """This rank's latents of an SAE, as an SAE of its own."""
        return sae

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter or statistic (d_sae, ...) of the whole SAE, from the part of each rank."""
        return tensor

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of a parameter or statistic (d_sae, ...)."""
        return tensor

    def all_codes(self, codes: Codes) -> Codes:
        """Codes over all latents, from the codes of each rank."""
        return codes

    def exchange(self, rows: Tensor | None) -> list[Tensor | None]:
        """(n, d_in) rows of every rank, by rank; None of one that has none."""
        return [rows]


class Ranks(Alone):
    """The ranks of a process group, as a grid.

    Args:
        latents: over how many ranks the dictionary is split; the others split the rows.
    Raises:
        ConfigError: a number of ranks that this does not divide.
    """

    def __init__(self, latents: int = 1) -> None:
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        if latents < 1 or self.size % latents:
            raise ConfigError(
                f"{self.size} ranks cannot be split into groups of {latents}: latent_ranks must divide them"
            )
        self.latents, self.data = latents, self.size // latents
        self.data_rank, self.latent_rank = divmod(self.rank, latents)
        # Every rank makes every group, in one order.
        rows = [dist.new_group([first + i for i in range(latents)]) for first in range(0, self.size, latents)]
        columns = [dist.new_group(list(range(first, self.size, latents))) for first in range(latents)]
        self._latent_group, self._data_group = rows[self.data_rank], columns[self.latent_rank]
        self._axes: dict[str, int] = {"idle": 0} if latents > 1 else {}

    @classmethod
    def joined(cls, latents: int = 1) -> Alone:
        """The grid of this process's group, begun here where ``torchrun`` started it; alone without one."""
        started = dist.is_available() and dist.is_initialized()
        if not started and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            started = True
        if started and dist.get_world_size() > 1:
            return cls(latents)
        if latents != 1:
            raise ConfigError(f"latent_ranks={latents} needs several processes: torchrun --nproc-per-node N ...")
        return Alone()

    # ------------------------------------------------------------- what is sent

    def _reduce(self, tensor: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> Tensor:
        self.sent += tensor.numel() * tensor.element_size()
        dist.all_reduce(tensor, op, group)
        return tensor

    def _gather(self, tensor: Tensor, group: Any) -> list[Tensor]:
        self.sent += tensor.numel() * tensor.element_size()
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group)
        return parts

    def over_latents(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """A tensor, of any shape, reduced in place over the ranks that share rows."""
        return self._reduce(tensor, self._latent_group, op)

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """Of each rank that shares rows, in the order of latents; of one shape."""
        return self._gather(tensor, self._latent_group)

    def exchange(self, rows: Tensor | None) -> list[Tensor | None]:
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, None if rows is None else (*rows.shape, str(rows.dtype)[6:]))
        known = [one for one in said if one is not None]
        longest, width, dtype = max(one[0] for one in known), known[0][1], getattr(torch, known[0][2])
        own = torch.zeros(longest, width, dtype=dtype, device=None if rows is None else rows.device)
        if rows is not None:
            own[: len(rows)] = rows
        found = self._gather(own, None)
        return [None if one is None else part[: one[0]] for part, one in zip(found, said, strict=True)]

    # --------------------------------------------------------------- one step

    def own(self, batch: Tensor) -> Tensor:
        if len(batch) % self.data:
            raise ConfigError(
                f"batches of {len(batch)} rows cannot be split over {self.data} ranks: change batch_size="
            )
        return batch[self.data_rank :: self.data].contiguous()

    def any(self, flag: Tensor) -> Tensor:
        return self._reduce(flag.clone(), None, dist.ReduceOp.MAX)

    def average_gradients(self, module: nn.Module) -> None:
        if self.data > 1:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    self._reduce(parameter.grad, self._data_group).div_(self.data)

    def merge_statistics(self, statistics: list[tuple[Tensor, Tensor]]) -> None:
        if self.data == 1:
            return
        for now, before in statistics:
            change = self._reduce(now - before, self._data_group)
            now.copy_(before + (change / self.data if now.is_floating_point() else change))

    def sum_latents(self, number: float) -> float:
        total = self._reduce(torch.tensor(number, dtype=torch.float64, device="cpu"), None)
        return float(total) / self.data

    def mean_rows(self, number: float) -> float:
        return float(self._reduce(torch.tensor(number, dtype=torch.float64, device="cpu"), None)) / self.size

    def least(self, counts: Tensor) -> None:
        if self.data > 1:
            self._reduce(counts, self._data_group, dist.ReduceOp.MIN)

    # ------------------------------------------------------------- the dictionary

    def check_agreement(self, sae: SAE, facts: dict[str, Any]) -> None:
        """Every rank must be asked for the same training; the weights are those of rank 0.

        Raises:
            ConfigError: on every rank, naming what differs.
        """
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, {"sae": sae.cfg.to_dict(), "finished": sae.finished, **facts})
        different = sorted({name for other in found for name in other if other[name] != found[0].get(name)})
        if different:
            shown = "; ".join(f"{n}: {sorted({repr(other.get(n)) for other in found})}" for n in different)
            raise ConfigError(f"the ranks disagree about the training ({shown}); give all of them the same")
        for tensor in sae.state_dict().values():
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, 0)
            tensor.data.copy_(whole)
        if not found[0]["finished"]:
            sae.begin_with_these_weights()

    def shard(self, sae: SAE) -> SAE:
        """This rank's latents of an SAE, as an SAE of its own whose products are joined with those of the others.

        Raises:
            ConfigError: a cell of the grid that cannot be split.
        """
        if self.latents == 1:
            return sae
        _check_cell(sae, self.latents)
        local, n = copy.deepcopy(sae), sae.d_sae // self.latents
        local.cfg.d_sae = local.dictionary.d_sae = local.activation.d_sae = n
        for module_name, module in local.named_modules():
            tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in tensors:
                full = f"{module_name}.{name}"
                axis = next((axis for axis, size in enumerate(tensor.shape) if size == sae.d_sae), None)
                if axis is None or (tensor.dim() == 2 and tuple(tensor.shape) == (sae.d_in, sae.d_in)):
                    continue
                self._axes[full] = axis
                part = self.part(full, tensor.detach())
                setattr(module, name, nn.Parameter(part) if isinstance(tensor, nn.Parameter) else part)
        kind = type(local.dictionary)
        local.dictionary.__class__ = type(f"Sharded{kind.__name__}", (ShardedDictionary, kind), {})
        local.dictionary.ranks = self  # type: ignore[assignment]
        local.finished = sae.finished
        if not sae.finished:
            local.begin_with_these_weights()
        return local

    def part(self, name: str, tensor: Tensor) -> Tensor:
        axis = self._axes.get(name)
        if axis is None:
            return tensor
        n = tensor.shape[axis] // self.latents
        part = tensor.narrow(axis, self.latent_rank * n, n)
        return part.T.contiguous().T if axis == 1 else part.contiguous()

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        axis = self._axes.get(name)
        if axis is None:
            return tensor
        parts = self.gathered(tensor.detach().T if axis == 1 else tensor.detach())
        joined = torch.cat(parts)
        return joined.T if axis == 1 else joined

    def all_codes(self, codes: Codes) -> Codes:
        if self.latents == 1:
            return codes
        found: list[Any] = [None] * self.latents
        own = codes.rows.cpu(), codes.indices.cpu() + self.latent_rank * codes.d_sae, codes.values.detach().cpu()
        dist.all_gather_object(found, own, self._latent_group)  # type: ignore[arg-type]
        rows, indices, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        order = (rows * (codes.d_sae * self.latents) + indices).argsort()
        sizes = torch.bincount(rows, minlength=codes.offsets.numel() - 1)
        device = codes.indices.device
        return Codes(
            indices[order].to(device),
            values[order].to(device),
            offsets_of(sizes).to(device),
            codes.shape,
            codes.d_sae * self.latents,
            codes.scale,
        )


def _check_cell(sae: SAE, latents: int) -> None:
    for what, known in SHARDED.items():
        if getattr(sae.cfg, what) not in known:
            raise ConfigError(f"a {what} {getattr(sae.cfg, what)!r} cannot be split over ranks; {', '.join(known)} can")
    settings = sae.cfg.settings
    whole = [
        f"{name}={settings[name]!r}"
        for name, plain in (("values", "score"), ("learn_alpha", False), ("start_l0", None), ("refine", 0))
        if settings.get(name, plain) != plain
    ]
    if whole:
        raise ConfigError(f"{', '.join(whole)} looks at all latents of a token at once: it cannot be split over ranks")
    if sae.d_sae % latents:
        raise ConfigError(f"{sae.d_sae} latents cannot be split evenly over {latents} ranks")


class ShardedDictionary(Dictionary):
    """A dictionary of some of the latents, joined with those of other ranks where all latents meet."""

    ranks: Ranks

    def total(self, latents: int) -> int:
        """Over all ranks."""
        return int(self.ranks.over_latents(torch.tensor(latents, dtype=torch.int64, device=self.keys.device)))

    def select(
        self,
        prepared: Prepared,
        rule: Any,
        *,
        among: Tensor | None = None,
        silenced: Tensor | None = None,
        step: Step = DEFAULT,
    ) -> Support:
        """Select own latents by the rule, without those below the threshold of all latents, for rows (rows, d)."""
        latents, rows = self.d_sae if among is None else among.numel(), prepared.queries.shape[0]
        if latents:
            own = type(rule)(min(rule.k, latents)) if isinstance(rule, (TopK, BatchTopK)) else rule
            support = super().select(prepared, own, among=among, silenced=silenced, step=step.exact())
        else:
            empty = prepared.queries.new_zeros(0)
            none = torch.zeros(0, dtype=torch.int64, device=empty.device)
            lowest = prepared.queries.new_full((rows,), -torch.inf)
            support = Support(none, none.new_zeros(rows + 1), lowest, empty).trusted(self.d_sae)
        if not isinstance(rule, (Sparsemax, Entmax, TopK, BatchTopK)):
            return support
        known = support.scores if support.scores is not None else super().scores(prepared, support, step=step)
        known = known.detach()
        if isinstance(rule, (Sparsemax, Entmax)):
            threshold = self._simplex(known, support, rule.alpha if isinstance(rule, Entmax) else 2.0)
            keep = known > threshold[support.rows]
        elif isinstance(rule, TopK):
            threshold, keep = self._largest_of_rows(known, support, rule.k)
        else:
            threshold, keep = self._largest_of_batch(known, support, rule.k * rows)
        sizes = torch.zeros(rows, dtype=torch.int64, device=known.device).index_add_(0, support.rows, keep.long())
        chosen = Support(support.indices[keep], offsets_of(sizes), threshold, known[keep]).trusted(self.d_sae)
        return chosen if silenced is None else chosen.with_scores(None)

    def _simplex(self, scores: Tensor, support: Support, alpha: float) -> Tensor:
        """(rows,) the score above which alpha-entmax over all latents is positive.

        A part's own threshold lies below that of the whole, and from below Newton's rule never steps over it: two sums
        of each row and step are exchanged. Source: Peters et al. 2019, arXiv:1905.05702.
        """
        power, rows = 1 / (alpha - 1), support.rows
        tau = self.ranks.over_latents(support.threshold.double().clone(), torch.distributed.ReduceOp.MAX)
        for _ in range(NEWTON_STEPS):
            above = ((alpha - 1) * (scores.double() - tau[rows])).clamp(min=0)
            slope = torch.where(above > 0, above.pow(power - 1), 0.0)
            sums = torch.zeros(len(tau), 2, dtype=torch.float64, device=tau.device)
            sums.index_add_(0, rows, torch.stack([slope * above, slope], dim=1))
            total, steep = self.ranks.over_latents(sums).unbind(1)
            step = ((total - 1) / steep.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0)
            tau = tau + step
            if not bool((step > 1e-14 * (1 + tau.abs())).any()):
                break
        return tau.to(scores.dtype)

    def _largest_of_rows(self, scores: Tensor, support: Support, k: int) -> tuple[Tensor, Tensor]:
        """Threshold and own entries of the k largest positive scores of each row; of equal ones the first latents."""
        rows = support.rows
        places = torch.arange(len(scores), device=scores.device) - support.offsets[rows]
        table = scores.new_full((support.n_rows, k), -torch.inf)
        table[rows, places] = scores
        tables = torch.stack(self.ranks.gathered(table))  # (ranks, rows, k)
        joined = tables.transpose(0, 1).flatten(1)
        smallest = joined.topk(k, dim=1).values[:, -1].clamp(min=0)
        room = k - (joined > smallest[:, None]).sum(1)
        equal = (tables == smallest[:, None]) & (tables > 0)
        room = room - equal[: self.ranks.latent_rank].sum((0, 2))
        tied = (scores == smallest[rows]) & (scores > 0)
        so_far = tied.long().cumsum(0)
        before = torch.cat([so_far.new_zeros(1), so_far])[support.offsets[:-1]]
        return smallest, (scores > smallest[rows]) | (tied & (so_far - before[rows] <= room[rows]))

    def _largest_of_batch(self, scores: Tensor, support: Support, budget: int) -> tuple[Tensor, Tensor]:
        """Threshold and own entries of the largest positive scores of the batch."""
        table = scores.new_full((budget,), -torch.inf)
        table[: len(scores)] = scores
        joined = torch.cat(self.ranks.gathered(table))
        smallest = joined.topk(budget).values[-1].clamp(min=0)
        return smallest.expand(support.n_rows), (scores >= smallest) & (scores > 0)

    def scores(self, prepared: Prepared, support: Support, *, step: Step = DEFAULT) -> Tensor:
        """(nnz,) scores of own latents; the gradients of the queries are summed over ranks in the backward pass."""
        queries = _SumOfGradients.apply(prepared.queries, self.ranks)
        return super().scores(prepared._replace(queries=queries), support, step=step)

    def sums(self, codes: Codes, *, step: Step = DEFAULT) -> Tensor:
        """(rows, d) sums, added up over the latents of all ranks."""
        return _Sum.apply(super().sums(codes, step=step), self.ranks)


class _Sum(torch.autograd.Function):
    """The sum over ranks; each rank's part has the gradient of the sum."""

    @staticmethod
    def forward(ctx, x, ranks):
        return ranks.over_latents(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, None


class _SumOfGradients(torch.autograd.Function):
    """The same tensor on every rank; its gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.ranks.over_latents(grad.clone(memory_format=torch.contiguous_format)), None


def iterate_together(ranks: Alone, batches: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """Groups of one batch for each rank."""
    group: list[tuple[int, Any]] = []
    for one in batches:
        group.append(one)
        if len(group) == ranks.size:
            yield group
            group = []
    if group:
        yield group
