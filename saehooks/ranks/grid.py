"""The grid that processes form: which of them share rows, which share latents, and what they send each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from saehooks.errors import ConfigError, RankError, SaehooksError

T = TypeVar("T")


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
        """The rows of a batch that this rank trains on."""
        return batch

    def any(self, flag: Tensor) -> Tensor:
        """() the largest of all ranks."""
        return flag

    def average_gradients(self, module: nn.Module) -> None:
        """Over the ranks that share latents."""

    def mean_over_rows(self, tensor: Tensor) -> Tensor:
        """A number of own rows, without gradient, as its mean over the ranks that split the rows."""
        return tensor

    def sum_latents(self, number: float) -> float:
        """A number that was counted over own latents, over all; averaged over the rows of all ranks."""
        return number

    def mean_rows(self, number: float) -> float:
        """A mean over own rows, over all."""
        return number

    def least(self, counts: Tensor) -> None:
        """Of each entry the smallest of the ranks that share latents, in place."""

    def all_latents(self, tensor: Tensor) -> Tensor:
        """(d_sae, ...) of all latents, from what each rank has of its own (n, ...)."""
        return tensor

    def own_latents(self, tensor: Tensor) -> Tensor:
        """This rank's part of what all latents have (d_sae, ...)."""
        return tensor

    def check_agreement(self, facts: Mapping[str, Any]) -> None:
        """Every rank must be asked for the same."""

    def broadcast(self, tensors: Mapping[str, Tensor]) -> None:
        """What the first rank has, to all, in place."""

    def exchange(self, rows: Tensor | None) -> list[Tensor | None]:
        """(n, d_in) rows of every rank, by rank; None of one that has none."""
        return [rows]

    def tell(self, found: Any) -> list[Any]:
        """What every rank has to say (any picklable object), by rank."""
        return [found]

    def agree(self, work: Callable[[], T]) -> T:
        """Do something that may fail on one rank alone, such as reading a file: where it does, every rank fails.

        Raises:
            Exception: on the rank where it failed, as it was; on the others one of the same kind that names the rank.
        """
        return work()


class Ranks(Alone):
    """The ranks of a process group, as a grid.

    Args:
        latents: over how many ranks the dictionary is split; the others split the rows.
    Raises:
        ConfigError: a number of ranks that this does not divide.
    """

    def __init__(self, latents: int = 1) -> None:
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self.check_agreement({"latent_ranks": latents})
        if self.size % max(1, latents) or latents < 1:
            raise ConfigError(
                f"{self.size} ranks cannot be split into groups of {latents}: latent_ranks must divide them"
            )
        self.latents, self.data = latents, self.size // latents
        self.data_rank, self.latent_rank = divmod(self.rank, latents)
        # Every rank makes every group, in one order.
        with self._answered():
            rows = [dist.new_group([first + i for i in range(latents)]) for first in range(0, self.size, latents)]
            columns = [dist.new_group(list(range(first, self.size, latents))) for first in range(latents)]
        self._latent_group, self._data_group = rows[self.data_rank], columns[self.latent_rank]
        self.newton_steps = 0
        """Rounds of sums that thresholds took, by which the bytes sent can be checked."""

    @classmethod
    def joined(cls, latents: int | None = 1) -> Alone:
        """The grid of this process's group, begun here where ``torchrun`` started it; alone without one.

        Args:
            latents: over how many ranks the dictionary is split; None for all.
        """
        started = dist.is_available() and dist.is_initialized()
        if not started and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            started = True
        if started and dist.get_world_size() > 1:
            return cls(dist.get_world_size() if latents is None else latents)
        if latents not in (1, None):
            raise ConfigError(f"latent_ranks={latents} needs several processes: torchrun --nproc-per-node N ...")
        return Alone()

    # ------------------------------------------------------------- what is sent

    def _reduce(self, tensor: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> Tensor:
        self.sent += tensor.numel() * tensor.element_size()
        with self._answered():
            dist.all_reduce(tensor, op, group)
        return tensor

    def _gather(self, tensor: Tensor, group: Any) -> list[Tensor]:
        self.sent += tensor.numel() * tensor.element_size()
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        with self._answered():
            dist.all_gather(parts, tensor.contiguous(), group)
        return parts

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Around what needs all ranks.

        Raises:
            RankError: one of them is gone.
        """
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.size}: another process ended or does not answer, so this one cannot go on "
                f"({str(error).strip().splitlines()[0]}). What it said itself tells why; start all of them again, with "
                "resume=True (on the command line: --resume) to go on from the last checkpoint"
            ) from error

    def over_latents(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduced in place over the ranks that share rows."""
        return tensor if self.latents == 1 else self._reduce(tensor, self._latent_group, op)

    def over_rows(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduced in place over the ranks that share latents."""
        return tensor if self.data == 1 else self._reduce(tensor, self._data_group, op)

    def over_all(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduced in place over all ranks."""
        return self._reduce(tensor, None, op)

    def gathered_latents(self, tensor: Tensor) -> list[Tensor]:
        """Of each rank that shares rows, in the order of latents; of one shape."""
        return [tensor] if self.latents == 1 else self._gather(tensor, self._latent_group)

    def gathered_rows(self, tensor: Tensor) -> list[Tensor]:
        """Of each rank that shares latents, in the order of their rows; of one shape."""
        return [tensor] if self.data == 1 else self._gather(tensor, self._data_group)

    def gathered_all(self, tensor: Tensor) -> list[Tensor]:
        """Of each rank; of one shape."""
        return self._gather(tensor, None)

    def exchange(self, rows: Tensor | None) -> list[Tensor | None]:
        said = self.tell(None if rows is None else (*rows.shape, str(rows.dtype)[6:]))
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

    def mean_over_rows(self, tensor: Tensor) -> Tensor:
        return tensor if self.data == 1 else self._reduce(tensor.detach().clone(), self._data_group) / self.data

    def sum_latents(self, number: float) -> float:
        total = self._reduce(torch.tensor(number, dtype=torch.float64, device="cpu"), None)
        return float(total) / self.data

    def mean_rows(self, number: float) -> float:
        return float(self._reduce(torch.tensor(number, dtype=torch.float64, device="cpu"), None)) / self.size

    def least(self, counts: Tensor) -> None:
        if self.data > 1:
            self._reduce(counts, self._data_group, dist.ReduceOp.MIN)

    def all_latents(self, tensor: Tensor) -> Tensor:
        return torch.cat(self.gathered_latents(tensor))

    def own_latents(self, tensor: Tensor) -> Tensor:
        n = len(tensor) // self.latents
        return tensor.narrow(0, self.latent_rank * n, n)

    def tell(self, found: Any) -> list[Any]:
        said: list[Any] = [None] * self.size
        with self._answered():
            dist.all_gather_object(said, found)
        return said

    def agree(self, work: Callable[[], T]) -> T:
        error: Exception | None = None
        try:
            result = work()
        except RankError:
            raise  # the others are in the same place, or gone
        except Exception as raised:
            error = raised
        told = self.tell(None if error is None else (type(error), error.args))
        if error is not None:
            raise error
        for rank, found in enumerate(told):
            if found is not None:
                raise _same_error(found[0], found[1], rank)
        return result

    def check_agreement(self, facts: Mapping[str, Any]) -> None:
        """Every rank must be asked for the same.

        Raises:
            ConfigError: on every rank, naming what differs.
        """
        found = self.tell(dict(facts))
        different = sorted({name for other in found for name in other if other[name] != found[0].get(name)})
        if different:
            shown = "; ".join(f"{n}: {sorted({repr(other.get(n)) for other in found})}" for n in different)
            raise ConfigError(f"the ranks disagree about the training ({shown}); give all of them the same")

    def broadcast(self, tensors: Mapping[str, Tensor]) -> None:
        for tensor in tensors.values():
            whole = tensor.detach().contiguous()
            with self._answered():
                dist.broadcast(whole, 0)
            tensor.data.copy_(whole)


def _same_error(kind: type[Exception], args: tuple[Any, ...], rank: int) -> Exception:
    """For the ranks where nothing failed: what failed on another."""
    said = f"on rank {rank}: {' '.join(map(str, args))}"
    if issubclass(kind, SaehooksError):
        return kind(said)
    if issubclass(kind, OSError) and len(args) > 1:
        return kind(args[0], f"on rank {rank}: {args[1]}")
    return RankError(f"{said} ({kind.__name__})")
