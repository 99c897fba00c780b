"""Activations on disk: harvested once, trained on as often as wanted, without the model."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from saehooks.attachments.request import refuse_others
from saehooks.errors import ConfigError, NotFiniteError, SiteError
from saehooks.hosts import Host, Site, host
from saehooks.streams.ahead import ahead
from saehooks.streams.fingerprint import Fingerprint
from saehooks.streams.seen import Mark, identity_of, position_of, unseen
from saehooks.streams.shards import BLOCK, DTYPES, ShardFolder
from saehooks.streams.tap import batch_by_batch, checked_batches, harvest_sites
from saehooks.where import Where, as_where, past_first

PART = 8
"""Blocks that are given out together."""
SHARD_BYTES = 256 * 2**20


class Activations:
    """Activations that ``sh.harvest(model, batches, at, to=folder)`` wrote: ``sh.fit(sh.Activations(folder), sae)``.

    Iterating gives (n, d_in) tensors of up to 8,192 rows, in the dtype they were stored in. Blocks of 1,024 rows come
    in random order over all shards (and a training's shuffle buffer mixes the rows of many blocks); they are read and
    checked by a thread beside the training. Several processes may read one folder.

    Args:
        folder: of the activations.
        shuffle: False for the order in which they were harvested.
        seed: of the order; the same seed gives the same order every time.
    Raises:
        FormatError: no activations there, or a file that is missing or cut short; while iterating, rows that were
            altered after they were written.
    """

    holds_activations = True

    def __init__(self, folder: str | Path, *, shuffle: bool = True, seed: int = 0) -> None:
        self._shards = ShardFolder(folder)
        self.shuffle, self.seed = shuffle, seed
        if not self._shards.complete:
            warnings.warn(f"{folder} holds the beginning of a harvest that was interrupted", stacklevel=2)

    @property
    def d_in(self) -> int:
        """Width of the rows."""
        return self._shards.width

    @property
    def dtype(self) -> torch.dtype:
        """What the rows are stored in."""
        return self._shards.dtype

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self._shards.rows

    @property
    def described(self) -> dict[str, Any]:
        """Of which model and site they are, and what of its ``data`` was noted, by the names of an SAE's metadata."""
        noted = {"data": self._shards.described["data"]} if "data" in self._shards.described else {}
        return {**noted, **self._shards.described["described"]}

    @property
    def positions(self) -> str:
        """Which positions of the model's inputs they are of."""
        return str(self._shards.described["positions"])

    @property
    def identity(self) -> str:
        """What tells these rows in this order from others."""
        content = hashlib.sha256(repr([shard.checksums for shard in self._shards.shards]).encode()).hexdigest()
        return f"activations {content[:16]} {f'shuffled by {self.seed}' if self.shuffle else 'in order'}"

    def __len__(self) -> int:
        return math.ceil(sum(math.ceil(shard.rows / BLOCK) for shard in self._shards.shards) / PART)

    def __iter__(self) -> Iterator[Tensor]:
        return self.from_batch(0)

    def from_batch(self, number: int) -> Iterator[Tensor]:
        """The tensors (n, d_in) from number ``number`` on, without reading those before it."""
        return ahead(self._read(number))

    def _read(self, number: int) -> Iterator[Tensor]:
        shards = self._shards.shards
        places = [(shard, block) for shard in shards for block in range(math.ceil(shard.rows / BLOCK))]
        order = list(range(len(places)))
        if self.shuffle:
            generator = torch.Generator(device="cpu").manual_seed(self.seed)
            order = torch.randperm(len(places), generator=generator, device="cpu").tolist()
        for start in range(number * PART, len(order), PART):
            yield torch.cat([self._shards.read(*places[one]) for one in order[start : start + PART]])

    def __repr__(self) -> str:
        site = self.described.get("hook_name", "activations")
        return f"Activations({self.rows} rows of width {self.d_in} in {str(self.dtype)[6:]}, {site!r})"


@overload
def harvest(
    model: Any, batches: Iterable[Any], at: str, *, head: int | None = None, where: Any = None
) -> Iterator[Tensor]:
    """Batch by batch, (n, width) each."""


@overload
def harvest(
    model: Any,
    batches: Iterable[Any],
    at: str,
    *,
    head: int | None = None,
    where: Any = None,
    to: str | Path,
    dtype: torch.dtype | None = None,
    max_norm: float | None = None,
    data: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Activations:
    """Into a folder."""


def harvest(
    model: Any,
    batches: Iterable[Any],
    at: str | None = None,
    *,
    head: int | None = None,
    where: Any = None,
    to: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_norm: float | None = None,
    data: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    **unknown: Any,
) -> Iterator[Tensor] | Activations:
    """Activations of a site, batch by batch, each forward stopped at the site; with ``to=`` into a folder.

    Args:
        model: any model that saehooks knows.
        batches: token tensors (batch, pos), images, or dicts of arguments; moved to the model's device.
        at: the site.
        head: one head of a per-head site.
        where: which positions; all but the first of each text by default, ``sh.everywhere`` for all. Never padding.
        to: a folder to write them to, as shards with checksums. A harvest that was interrupted, or whose batches have
            become more, goes on by the same call; batches that the folder holds already are not run again.
        dtype: to store in; that of the activations if not given.
        max_norm: leave out rows whose norm is above so many times the median of the first batch.
        data: what SAEs that are trained from the folder should remember of the texts, as JSON can hold it.
        shard_bytes: size at which a shard is closed, at the end of a batch.
    Returns:
        (n, width) rows, in the dtype and on the device of the model: between two of them the model carries no hook.
        With ``to=`` the folder's `Activations`.
    Raises:
        ConfigError: a text instead of batches; a folder that holds activations of another kind, or of other batches.
        NeverFiredError: a forward ended without passing the site.
        NotFiniteError: an activation to be written is NaN or infinite, or too large for the dtype.
        StorageError: the disk is full, or another process writes to the folder.
    """
    refuse_others(harvest, unknown)
    if at is None:
        raise SiteError("harvest needs the site: pass at=..., one of the names in sh.sites(model)")
    if to is None:
        if dtype is not None or max_norm is not None or data is not None:
            raise ConfigError("dtype=, max_norm= and data= are for activations written to a folder: give to= too")
        return batch_by_batch(model, checked_batches(batches), at, head=head, where=where)
    source = host(model)
    site = source.site(at, head)
    rule = past_first if where is None else as_where(where)
    return harvest_to(source, checked_batches(batches), site, rule, to, dtype, max_norm, shard_bytes, data)


def harvest_to(
    source: Host,
    batches: Iterable[Any],
    site: Site,
    where: Where,
    folder: str | Path,
    dtype: torch.dtype | None,
    max_norm: float | None,
    shard_bytes: int,
    data: Mapping[str, Any] | None = None,
) -> Activations:
    """Write a site's activations to a folder; what an earlier call left unfinished there goes on.

    Args:
        source, site: of the model.
        where: the rule of positions.
        batches, folder, dtype, max_norm, shard_bytes, data: as for `harvest`.
    """
    if max_norm is not None and not max_norm > 0:
        raise ConfigError(f"max_norm is a multiple of the median norm, above 0, got {max_norm}")
    if dtype is not None and dtype not in DTYPES.values():
        raise ConfigError(f"activations are stored in {', '.join(DTYPES)}, got dtype={dtype}")
    facts: dict[str, Any] = {
        "described": {**source.describe(), "hook_name": site.name, "head": site.head},
        "positions": re.sub(r" at 0x[0-9a-f]+", "", repr(where)),
        "max_norm": max_norm,
        **({} if dtype is None else {"dtype": str(dtype)[6:]}),
    }
    begun = ShardFolder.begun(folder, facts)
    mark = Mark(source=identity_of(batches)) if begun is None else begun.mark
    current: list[Any] = []

    def noted() -> Iterator[Any]:
        for number, batch in unseen(batches, [mark]):
            current[:] = [batch, position_of(batches, number)]
            yield batch

    parts: Iterator[tuple[Tensor, Any, Any]] = (
        (rows, *current) for (rows,) in harvest_sites(source, noted(), [(site, where)])
    )
    if begun is None:
        first = next(parts, None)
        if first is None:
            raise ConfigError("no activation came, so nothing was written: there are no batches")
        parts = chain([first], parts)
        more = {} if data is None else {"data": dict(data)}
        begun = ShardFolder.make(folder, {"dtype": str(first[0].dtype)[6:], **facts, **_measured(first[0]), **more})
    with begun.writing():
        _write(begun, parts, mark, shard_bytes)
    return Activations(folder)


def _measured(rows: Tensor) -> dict[str, Any]:
    """What is only known of activations when the first have come: width, and the median of their norms."""
    return {"d_in": rows.shape[1], "median_norm": float(rows.float().norm(dim=1).median()) if len(rows) else None}


def _write(folder: ShardFolder, parts: Iterable[tuple[Tensor, Any, Any]], mark: Mark, shard_bytes: int) -> None:
    """Write shards that end where a batch ends, and say in the last line that the batches ended."""
    limit = max(1, shard_bytes // (folder.width * folder.dtype.itemsize))
    data, number, held, count = Fingerprint(mark.value, mark.last), mark.number, [], 0
    position = mark.position
    for rows, batch, position in parts:
        held.append(_kept(rows, folder))
        data.add(batch)
        number, count = number + 1, count + len(held[-1])
        if count >= limit:
            folder.append(torch.cat(held), Mark(number, data.value, data.last, mark.source, position))
            held, count = [], 0
    if held or not folder.complete:
        rest = torch.cat(held) if held else torch.zeros(0, folder.width)
        folder.append(rest, Mark(number, data.value, data.last, mark.source, position), complete=True)


def _kept(rows: Tensor, folder: ShardFolder) -> Tensor:
    """The rows that are stored, on the CPU and in the folder's dtype."""
    multiple, median = folder.described["max_norm"], folder.described["median_norm"]
    if multiple is not None and median is not None:
        rows = rows[rows.float().norm(dim=1) <= multiple * median]
    stored = rows.to("cpu", folder.dtype)
    if not torch.isfinite(stored.sum(dtype=torch.float64)):
        bad = int((~stored.isfinite()).any(1).sum())
        raise NotFiniteError(
            f"{bad} of {len(rows)} activations are NaN or infinite in {str(folder.dtype)[6:]}; "
            "dtype=torch.float32 or torch.bfloat16 has the wider range"
        )
    return stored
