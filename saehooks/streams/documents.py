"""Where texts and tokens come from: strings, files of any size, datasets and arrays, entered at any place.

A source gives *pieces*: texts, or tokens. A long document is given in pieces of about 64,000 characters, cut at the end
of a line, so that memory does not grow with it. Every piece has a place, by which it is entered again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from saehooks.errors import ConfigError

PIECE = 65_536
"""Characters of a text, or tokens of an array, that are taken at once."""
ROWS = 64
"""Rows of a Parquet file that are taken at once."""
COLUMNS = ("text", "input_ids", "tokens", "content")
"""Names under which a row of a dataset may hold its text or tokens; the first that is there."""
LINE_END = re.compile(r"(?<=\S)\n(?=\S)")
"""A place where a text can be cut without any tokenizer's seeing it: one newline between two characters."""


SPACE = re.compile(r"(?<=\S)(?= \S)")
"""The next best place, before a space, which belongs to the word after it."""


class Piece(NamedTuple):
    """A part of a document."""

    place: list[int]
    """Where it is entered again: numbers whose meaning is the source's."""
    content: str | Sequence[int] | np.ndarray
    """Text or tokens."""
    begins: bool
    """Whether a document begins here."""


def _place(place: list[int], length: int) -> list[int]:
    """The numbers of a place; one written before documents were given in pieces ends earlier."""
    return [*place, *[0] * (length - len(place))]


class Source(Protocol):
    """Documents in a fixed order."""

    @property
    def name(self) -> str:
        """What tells this source from others."""

    @property
    def characters(self) -> int | None:
        """About how many there are, where that is known without reading."""

    def pieces(self, place: list[int]) -> Iterator[Piece]:
        """From a place on; [] for the beginning."""


class Texts:
    """Strings in memory: one document each."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts, self.characters = texts, sum(map(len, texts))
        self.name = f"{len(texts)} texts of {self.characters} characters"

    def pieces(self, place: list[int]) -> Iterator[Piece]:
        document, offset = place or (0, 0)
        for number in range(document, len(self._texts)):
            yield from _in_pieces([number], self._texts[number], offset)
            offset = 0


def _cut(text: str, start: int) -> int:
    """Where a piece of a text that begins at ``start`` ends."""
    if len(text) - start <= PIECE * 3 // 2:
        return len(text)
    found = LINE_END.search(text, start + PIECE, start + 4 * PIECE) or SPACE.search(
        text, start + PIECE, start + 2 * PIECE
    )
    return found.end() if found else start + PIECE


def _in_pieces(place: list[int], content: Any, start: int) -> Iterator[Piece]:
    """A document from a character on; tokens as they are. An empty one gives nothing, thus no BOS either."""
    if not isinstance(content, str):
        if len(content):
            yield Piece([*place, 0], content, True)
        return
    while start < len(content):
        end = _cut(content, start)
        yield Piece([*place, start], content[start:end], start == 0)
        start = end


class TextFiles:
    """Text files: one document each, read piece by piece."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self.characters = sum(file.stat().st_size for file in files)
        self.name = _names(files)

    def pieces(self, place: list[int]) -> Iterator[Piece]:
        number, offset = place or (0, 0)
        for one in range(number, len(self._files)):
            with self._files[one].open("rb") as file:
                file.seek(offset)
                held, ended = b"", False
                while not ended:
                    chunk = file.read(16 * PIECE)
                    held, ended, at = held + chunk, not chunk, 0
                    text = _decoded(held, self._files[one], ended)
                    # Where a piece ends depends on what follows its beginning alone, so that it can be entered again.
                    while at < len(text) if ended else len(text) - at > 6 * PIECE:
                        part = text[at : _cut(text, at)]
                        yield Piece([one, offset], part, offset == 0)
                        at += len(part)
                        offset += len(part.encode())
                    held = held[len(text[:at].encode()) :]
            offset = 0


def _decoded(data: bytes, file: Path, ended: bool) -> str:
    """Text of bytes; a character that is cut off at the end waits for the rest unless the file has ended."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if not ended and error.start > len(data) - 4:
            return data[: error.start].decode("utf-8")
        raise ConfigError(
            f"{file} is not UTF-8 text ({error.reason}): convert it, or is it of another kind?"
        ) from error


class JsonLines:
    """Files of one JSON object a line, each a document."""

    def __init__(self, files: Sequence[Path], column: str | None) -> None:
        self._files, self._column, self.characters = files, column, sum(file.stat().st_size for file in files)
        self.name = f"{_names(files)}, column {column}"

    def pieces(self, place: list[int]) -> Iterator[Piece]:
        number, offset, start = _place(place, 3)
        for one in range(number, len(self._files)):
            with self._files[one].open("rb") as file:
                file.seek(offset)
                for line in file:
                    if line.strip():
                        where = f"{self._files[one]}, at byte {offset}"
                        try:
                            row = json.loads(line)
                        except ValueError as error:
                            raise ConfigError(f"{where}: not a line of JSON ({error})") from error
                        yield from _in_pieces([one, offset], _content(row, self._column, where), start)
                        start = 0
                    offset += len(line)
            offset = 0


class Parquet:
    """Parquet files, each row a document; a row group, which may be the whole file, is read a few rows at a time."""

    characters = None

    def __init__(self, files: Sequence[Path], column: str | None) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ConfigError("reading Parquet files needs pyarrow: pip install pyarrow") from error
        self._open, self._files, self._column = pyarrow.parquet.ParquetFile, files, column
        self.name = f"{_names(files)}, column {column}"
        for file in files:
            _column(self._opened(file).schema_arrow.names, column, str(file))

    def _opened(self, file: Path) -> Any:
        try:
            return self._open(file, buffer_size=2**20, pre_buffer=False)  # else a row group's column is held whole
        except Exception as error:  # of pyarrow
            raise ConfigError(f"{file} cannot be read as Parquet: {error}") from error

    def pieces(self, place: list[int]) -> Iterator[Piece]:
        number, group, row, start = _place(place, 4)
        for one in range(number, len(self._files)):
            file = self._opened(self._files[one])
            column = _column(file.schema_arrow.names, self._column, str(self._files[one]))
            for part in range(group, file.num_row_groups):
                first = 0
                for batch in file.iter_batches(ROWS, row_groups=[part], columns=[column]):
                    for index in range(max(first, row), first + len(batch)):
                        value = batch.column(column)[index - first].as_py()
                        content = _checked(value, f"{self._files[one]}, row {index} of row group {part}")
                        yield from _in_pieces([one, part, index], content, start)
                        start = 0
                    first += len(batch)
                row = 0
            group = 0


class Rows:
    """Anything that gives rows again and again: a dataset of Hugging Face, a list of dicts or of token lists."""

    characters = None

    def __init__(self, rows: Any, column: str | None) -> None:
        self._rows, self._column = rows, column
        names = getattr(rows, "column_names", None)
        if names:
            self._column = _column(names, column, type(rows).__name__)
        size = f"{len(rows)} rows" if hasattr(rows, "__len__") else "a stream of rows"
        self.name = f"{type(rows).__name__} of {size}, column {self._column}"
        fingerprint = getattr(rows, "_fingerprint", None)
        self.name += f", {fingerprint}" if fingerprint else ""

    def pieces(self, place: list[int]) -> Iterator[Piece]:
        first, start = _place(place, 2)
        if hasattr(self._rows, "__getitem__") and hasattr(self._rows, "__len__"):
            rows: Iterable[Any] = (self._rows[index] for index in range(first, len(self._rows)))
        else:
            stream = self._rows.skip(first) if hasattr(self._rows, "skip") else self._rows
            rows = stream if hasattr(self._rows, "skip") else _after(stream, first)
        for number, row in enumerate(rows, first):
            yield from _in_pieces([number], _content(row, self._column, f"row {number}"), start)
            start = 0


def _after(rows: Iterable[Any], first: int) -> Iterator[Any]:
    for number, row in enumerate(rows):
        if number >= first:
            yield row


class TokenArray:
    """Tokens that were made before: one long array, or (n, length) whose rows are documents; mapped, not read."""

    characters = None

    def __init__(self, tokens: Any, name: str) -> None:
        array = tokens if isinstance(tokens, np.ndarray) else np.asarray(tokens)
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or not array.size:
            raise ConfigError(f"tokens are integers of shape (n,) or (n, length), got {array.dtype} {array.shape}")
        self._array, self.name = array, f"{name} {array.shape} {array.dtype}"

    def pieces(self, place: list[int]) -> Iterator[Piece]:
        first = place[0] if place else 0
        step = PIECE if self._array.ndim == 1 else 1
        for start in range(first, len(self._array), step):
            yield Piece([start], self._array[start : start + step].reshape(-1), start == 0 or self._array.ndim == 2)


def source_of(given: Any, column: str | None = None) -> Source:
    """The source of whatever `TokenBatches` takes.

    Raises:
        ConfigError: files that do not exist or are of different kinds, a column that is not there, or no source at all.
    """
    if isinstance(given, str):
        return Texts([given])
    if isinstance(given, Path) and given.is_dir():
        raise ConfigError(f"{given} is a folder; give its files: sorted(Path({str(given)!r}).glob('*.txt'))")
    if isinstance(given, (np.ndarray, Tensor)):
        return TokenArray(given if isinstance(given, np.ndarray) else given.cpu(), "tokens")
    files = _files(given)
    if files:
        return _of_files(files, column)
    if isinstance(given, (list, tuple)) and given and all(isinstance(one, str) for one in given):
        return Texts(given)
    if isinstance(given, Mapping) and given and all(hasattr(one, "column_names") for one in given.values()):
        names = list(map(repr, given))
        raise ConfigError(f"these are several datasets, {', '.join(names)}: give one, dataset[{names[0]}]")
    indexed = hasattr(given, "__getitem__") and hasattr(given, "__len__")
    if (indexed or isinstance(given, Iterable)) and not isinstance(given, (Iterator, Mapping)):
        return Rows(given, column)
    raise ConfigError(
        f"no texts or tokens can be read from {type(given).__name__}: give a list, files or a dataset, that can be "
        "read again"
    )


def _files(given: Any) -> list[Path]:
    """The files that were given, [] for anything else."""
    listed = [given] if isinstance(given, Path) else given if isinstance(given, (list, tuple)) else []
    named = [one for one in listed if isinstance(one, Path) or (isinstance(one, str) and _is_name(one))]
    if not named or len(named) < len(listed):
        return []
    missing = [str(one) for one in named if not Path(one).is_file()]
    if missing:
        raise ConfigError(f"no such text file: {', '.join(missing)}")
    return [Path(one) for one in named]


def _is_name(text: str) -> bool:
    """Whether a text is the name of a file, one that is not there included."""
    short = len(text) < 500 and "\n" not in text
    return short and (Path(text).is_file() or re.fullmatch(r"\S+\.(txt|jsonl|ndjson|parquet|pq|npy)", text) is not None)


def _of_files(files: list[Path], column: str | None) -> Source:
    endings = {file.suffix.lower() for file in files}
    if endings <= {".jsonl", ".ndjson"}:
        return JsonLines(files, column)
    if endings <= {".parquet", ".pq"}:
        return Parquet(files, column)
    if endings <= {".npy"} and len(files) == 1:
        return TokenArray(np.load(files[0], mmap_mode="r", allow_pickle=False), _names(files))
    if endings & {".jsonl", ".ndjson", ".parquet", ".pq", ".npy"}:
        raise ConfigError(f"files of different kinds together: {', '.join(sorted(endings))}; give them one by one")
    return TextFiles(files)


def _names(files: Sequence[Path]) -> str:
    return ", ".join(f"{file.name} ({file.stat().st_size} bytes)" for file in files)


def _column(names: Sequence[str], column: str | None, where: str) -> str:
    wanted = [column] if column is not None else list(COLUMNS)
    found = next((name for name in wanted if name in names), None)
    if found is None:
        asked = f"no column {column!r}" if column is not None else f"none of the columns {', '.join(COLUMNS)}"
        raise ConfigError(f"{where} has {asked}; it has {', '.join(map(str, names))}: write column=...")
    return found


def _content(row: Any, column: str | None, where: str) -> Any:
    if isinstance(row, Mapping):
        row = row[_column(list(row), column, where)]
    return _checked(row, where)


def _checked(value: Any, where: str) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(one, int) for one in value):
        return value
    raise ConfigError(f"{where}: a text or a list of tokens is expected, got {type(value).__name__}")
