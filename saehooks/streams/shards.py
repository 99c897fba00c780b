"""A folder of activations: safetensors shards, a description, and one line for each shard that is whole.

The description (``index.json``) is written first. A shard is written under another name and renamed; then its line is
added to ``shards.jsonl``. So a process killed at any moment leaves whole shards, and a last line that may be torn.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from saehooks.errors import ConfigError, FormatError, StorageError
from saehooks.storage import read_json, write_file
from saehooks.streams.seen import Mark

INDEX, LINES, FORMAT = "index.json", "shards.jsonl", "saehooks activations"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
BLOCK = 1024
"""Rows that are read at once, and have a checksum of their own."""


class Shard(NamedTuple):
    """One file of rows."""

    file: str
    rows: int
    size: int
    """Bytes of the file."""
    start: int
    """Byte at which the rows begin."""
    checksums: list[int]
    """CRC-32 of each block of `BLOCK` rows."""
    mark: Mark
    """How far in the model's inputs this shard ends."""
    complete: bool = False
    """Whether the batches ended here."""


class ShardFolder:
    """Reads and extends a folder of shards.

    Args:
        folder: where.
    Raises:
        FormatError: no such folder, or one whose files are not those of its index.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise FormatError(
                f"no activations in {self.folder}: it has no {INDEX}; sh.harvest(model, batches, at, to=...) makes one"
            )
        self.described = read_json(self.folder / INDEX)
        if self.described.get("format") != FORMAT or self.described.get("dtype") not in DTYPES:
            raise FormatError(f"{self.folder / INDEX} does not describe activations that this version can read")
        self.width, self.dtype = int(self.described["d_in"]), DTYPES[self.described["dtype"]]
        self.shards = list(self._lines())

    @classmethod
    def begun(cls, folder: str | Path, facts: dict[str, Any]) -> ShardFolder | None:
        """The folder if it holds activations of which these facts are true, None if it holds none.

        Raises:
            ConfigError: it holds activations of another kind.
            FormatError: it holds shards without a description.
        """
        place, wanted = Path(folder), json.loads(json.dumps(facts))
        if not (place / INDEX).is_file():
            if (place / LINES).exists() or any(place.glob("shard-*")):
                raise FormatError(f"{place} holds shards without {INDEX}; give another folder")
            return None
        found = cls(place)
        different = [name for name in wanted if wanted[name] != found.described.get(name)]
        if different:
            shown = "; ".join(f"{n}: {found.described.get(n)!r} there, {wanted[n]!r} now" for n in different)
            raise ConfigError(f"{place} holds activations of another kind ({shown}); give another folder")
        return found

    @classmethod
    def make(cls, folder: str | Path, described: dict[str, Any]) -> ShardFolder:
        """A new folder for such activations."""
        place = Path(folder)
        try:
            place.mkdir(parents=True, exist_ok=True)
            write_file(place / INDEX, (json.dumps({"format": FORMAT, **described}, indent=1) + "\n").encode())
        except OSError as error:
            raise StorageError(f"cannot write to {place}: {error.strerror or error}; give another folder") from error
        return cls(place)

    def _lines(self) -> Iterator[Shard]:
        path = self.folder / LINES
        self._length = self._end_of_lines()
        text = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(text[: self._length].splitlines()):
            try:
                found = json.loads(line)
                shard = Shard(**{**found, "mark": Mark(**found["mark"])})
            except (ValueError, TypeError, KeyError) as error:
                raise FormatError(f"{path}: line {number + 1} is not readable ({error})") from error
            file = self.folder / shard.file
            size = file.stat().st_size if Path(shard.file).name == shard.file and file.is_file() else None
            if shard.rows and size != shard.size:
                what = (
                    "is missing" if size is None else f"has {size} bytes, {shard.size} were written: it was cut short"
                )
                raise FormatError(f"{file} {what}")
            yield shard

    def _end_of_lines(self) -> int:
        """Bytes of the lines that are whole."""
        path = self.folder / LINES
        return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def complete(self) -> bool:
        """Whether the batches ended."""
        return bool(self.shards) and self.shards[-1].complete

    def read(self, shard: Shard, block: int) -> Tensor:
        """(n, d_in) rows of one block.

        Raises:
            FormatError: they are not those that were written.
        """
        first = block * BLOCK
        count = min(BLOCK, shard.rows - first)
        row = self.width * self.dtype.itemsize
        data, path = bytearray(count * row), self.folder / shard.file
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(shard.start + first * row)
                got = file.readinto(data)
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error.strerror}") from error
        if got != len(data) or zlib.crc32(data) != shard.checksums[block]:
            raise FormatError(
                f"{path}: rows {first} to {first + count} were altered after they were written: their checksum is not "
                f"the one in {LINES}"
            )
        return torch.frombuffer(data, dtype=self.dtype).reshape(count, self.width)

    @property
    def mark(self) -> Mark:
        """How far in the model's inputs the shards reach."""
        return self.shards[-1].mark if self.shards else Mark()

    def append(self, rows: Tensor, mark: Mark, complete: bool = False) -> None:
        """Write one more shard and its line.

        Args:
            rows: (n, d_in); n may be 0 where the batches ended without another row.
            mark, complete: see `Shard`.
        Raises:
            StorageError: the disk is full, or the folder cannot be written; what was there stays.
        """
        name, size, start, checksums = f"shard-{len(self.shards):06d}.safetensors", 0, 0, []
        rows = rows.to("cpu", self.dtype).contiguous()
        try:
            if len(rows):
                content = to_bytes({"rows": rows}, metadata={"format": FORMAT})
                size, start = len(content), 8 + int.from_bytes(content[:8], "little")
                step = BLOCK * self.width * self.dtype.itemsize
                checksums = [zlib.crc32(content[at : at + step]) for at in range(start, size, step)]
                write_file(self.folder / name, content)
            shard = Shard(name, len(rows), size, start, checksums, mark, complete)
            self._add_line(shard)
        except OSError as error:
            raise StorageError(
                f"shard {len(self.shards)} could not be written to {self.folder} ({error.strerror or error}); the "
                f"{self.rows} rows before it are kept: the same call goes on from there"
            ) from error
        self.shards.append(shard)

    def _add_line(self, shard: Shard) -> None:
        path = self.folder / LINES
        path.touch()
        with path.open("r+b") as file:
            file.truncate(self._length)  # a line that a kill or a full disk has torn
            file.seek(self._length)
            line = {**shard._asdict(), "mark": shard.mark._asdict()}
            file.write((json.dumps(line) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            self._length = file.tell()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One writer at a time; what one that was killed left half written is removed.

        Raises:
            StorageError: another process is writing there.
        """
        with (self.folder / ".lock").open("w") as lock:
            try:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # no such locks on Windows
                pass
            except OSError as error:
                raise StorageError(f"another process is writing activations to {self.folder}") from error
            if self._end_of_lines() != self._length:
                raise StorageError(f"another process has written to {self.folder} meanwhile: call again")
            for left in self.folder.glob(".shard-*"):
                left.unlink()
            yield
