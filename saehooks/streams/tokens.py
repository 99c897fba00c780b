"""Text as batches of tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saehooks.errors import ConfigError
from saehooks.streams.ahead import ahead
from saehooks.streams.documents import Piece, source_of

SMALL = 2**24
"""Characters of a source that is tokenised at once, so that its length is known."""
TOGETHER = 16
"""Pieces that are tokenised together."""
REMEMBERED = 64
"""Batches whose places are remembered: a reader may be behind the batches that are made ahead."""


class TokenSequence(NamedTuple):
    """One row of a batch."""

    place: list[int]
    """Of the piece in which it begins."""
    dropped: int
    """Tokens of that piece before it."""
    tokens: np.ndarray
    """(length,) int64."""


class TokenBatches:
    """Text cut into sequences of tokens, batch by batch; iterating again gives the same batches.

    Small sources are tokenised at once, and their number of batches is known. Larger ones are read and tokenised by a
    thread beside the model, in memory that does not grow with them; such batches have no length, so give a training
    its ``steps=``. Either can be entered at any batch, by which a training resumes.

    Args:
        tokenizer: a Hugging Face tokenizer; only its special tokens are used where tokens are given.
        source: a text, or a list of them; text files (of any size), ``.jsonl`` or ``.parquet`` files; a dataset of
            Hugging Face, streaming or not, or anything else with rows; tokens as a list of lists, an array or tensor
            (n,) or (n, length), or an ``.npy`` file, which is not read into memory.
        context: tokens in a sequence, the leading BOS included.
        batch_size: sequences in a batch.
        limit: stop after about this many tokens.
        column: of the rows of files and datasets; by default the first there is of text, input_ids, tokens, content.
        documents: ``"join"``: one follows the other, and a sequence may go across; ``"pad"``: a sequence holds one
            document, or a part of it, and short ones are padded: batches are then dicts with an ``attention_mask``.
        bos: ``"sequence"``: every sequence begins with it; ``"document"``: every document; None: none is added.
    Raises:
        ConfigError: too little for one sequence, or a source that cannot be read; says why.
    """

    def __init__(
        self,
        tokenizer: Any,
        source: Any,
        *,
        context: int = 256,
        batch_size: int = 8,
        limit: int | None = None,
        column: str | None = None,
        documents: str = "join",
        bos: str | None = "sequence",
    ) -> None:
        if (tokenizer is None and bos is not None) or isinstance(tokenizer, (str, Path, list, Tensor)):
            raise ConfigError(
                f"TokenBatches(tokenizer, source) begins with a tokenizer, got {type(tokenizer).__name__}; "
                "write TokenBatches(model.tokenizer, texts), or AutoTokenizer.from_pretrained(name)"
            )
        if context < 2 or batch_size < 1:
            raise ConfigError(f"need context >= 2 and batch_size >= 1, got context={context}, batch_size={batch_size}")
        if documents not in ("join", "pad") or bos not in ("sequence", "document", None):
            raise ConfigError(
                f"documents is 'join' or 'pad' and bos 'sequence', 'document' or None, got {documents!r} and {bos!r}"
            )
        self._tokenizer, self._source = tokenizer, source_of(source, column)
        self.context, self.batch_size, self.limit = context, batch_size, limit
        self._documents, self._bos = documents, bos
        first = None if bos is None else leading_token(tokenizer)
        if bos is not None and first is None:
            raise ConfigError("this tokenizer has neither a BOS nor an EOS token to begin with: write bos=None")
        self._lead = [] if first is None else [first]
        self._places: OrderedDict[int, list] = OrderedDict()
        self._rows: list[TokenSequence] | None = None
        characters = self._source.characters
        if (characters is not None and characters <= SMALL) or (limit is not None and limit * 4 <= SMALL):
            self._rows = list(self._sequences([], 0, 0))

    @property
    def tokens(self) -> Tensor:
        """(sequences, context) int64 of a small source, documents joined.

        Raises:
            ConfigError: a large source, or padded documents.
        """
        if self._rows is None or self._documents == "pad":
            raise ConfigError("only a small source whose documents are joined is held as one tensor: iterate instead")
        return torch.from_numpy(np.stack([row.tokens for row in self._rows]))

    def __iter__(self) -> Iterator[Any]:
        return self.from_batch(0)

    def from_batch(self, number: int, position: list | None = None) -> Iterator[Any]:
        """The batches from one on.

        Args:
            number: of the first.
            position: what `position_of` said of it; without, what comes before it is tokenised again.
        """
        if self._rows is not None:
            starts = range(number * self.batch_size, len(self._rows), self.batch_size)
            return (self._batch(self._rows[start : start + self.batch_size]) for start in starts)
        return ahead(self._stream(number, position), 4)

    def position_of(self, number: int) -> list | None:
        """Where a batch that was given out lately begins, for `from_batch`: a list of numbers that JSON can hold."""
        return self._places.get(number)

    @property
    def identity(self) -> str:
        """What tells these batches from others."""
        return (
            f"{self._source.name}; context={self.context}, batch_size={self.batch_size}, limit={self.limit}, "
            f"documents={self._documents}, bos={self._bos}, tokenizer {getattr(self._tokenizer, 'name_or_path', '')}"
        )

    def __len__(self) -> int:
        if self._rows is None:
            raise TypeError("a large source has no length before it was read")
        return -(-len(self._rows) // self.batch_size)

    def __repr__(self) -> str:
        if self._rows is None:
            return f"TokenBatches({self._source.name}, in sequences of {self.context})"
        count = sum(len(row.tokens) for row in self._rows)
        return f"TokenBatches({len(self)} batches, {count} tokens in sequences of {self.context})"

    # ------------------------------------------------------------ how they are made

    def _stream(self, number: int, position: list | None) -> Iterator[Any]:
        """Batches of a large source, their places noted."""
        if position is None:
            rows = self._sequences([], 0, 0)
            for _ in range(number * self.batch_size):
                next(rows, None)
        else:
            rows = self._sequences(position[0], position[1], number * self.batch_size)
        held: list[TokenSequence] = []
        for row in rows:
            held.append(row)
            if len(held) == self.batch_size:
                yield self._noted(number, held)
                number, held = number + 1, []
        if held:
            yield self._noted(number, held)

    def _noted(self, number: int, rows: list[TokenSequence]) -> Any:
        self._places[number] = [rows[0].place, rows[0].dropped]
        while len(self._places) > REMEMBERED:
            self._places.popitem(last=False)
        return self._batch(rows)

    def _batch(self, rows: list[TokenSequence]) -> Any:
        if self._documents == "join":
            return torch.from_numpy(np.stack([row.tokens for row in rows]))
        longest = max(len(row.tokens) for row in rows)
        ids = torch.full((len(rows), longest), self._padding, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row.tokens)] = torch.from_numpy(row.tokens)
            mask[i, : len(row.tokens)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    @property
    def _padding(self) -> int:
        found = getattr(self._tokenizer, "pad_token_id", None)
        return found if found is not None else (leading_token(self._tokenizer) or 0)

    def _sequences(self, place: list[int], dropped: int, made: int) -> Iterator[TokenSequence]:
        """Sequences from a place on, ``made`` of them being before it.

        Raises:
            ConfigError: there is not a single one.
        """
        most = None if self.limit is None else max(1, self.limit // self.context)
        lead = self._lead if self._bos == "sequence" else []
        size, seen = self.context - len(lead), 0
        held: list[int] = []
        start: tuple[list[int], int] = (place, dropped)
        for piece, ids in self._tokenised(place):
            at = dropped  # where in the ids of this piece the next sequence begins
            if piece.begins and self._documents == "pad" and held:
                yield _sequence(start, lead + held)
                held, made = [], made + 1
                if made == most:
                    return
            seen += len(ids) - dropped
            while at < len(ids):
                if not held:
                    start = (piece.place, at)
                taken = ids[at : at + size - len(held)]
                held, at = held + taken, at + len(taken)
                if len(held) == size:
                    yield _sequence(start, lead + held)
                    held, made = [], made + 1
                    if made == most:
                        return
            dropped = 0
        if held and self._documents == "pad":
            yield _sequence(start, lead + held)
            made += 1
        if not made:
            raise ConfigError(f"the text has {seen} tokens, too few for one sequence of {self.context}")

    def _tokenised(self, place: list[int]) -> Iterator[tuple[Piece, list[int]]]:
        """Pieces with their tokens, the BOS of a document with its first piece."""
        group: list[Piece] = []
        for piece in self._source.pieces(place):
            group.append(piece)
            if len(group) == TOGETHER:
                yield from self._together(group)
                group = []
        yield from self._together(group)

    def _together(self, group: list[Piece]) -> Iterator[tuple[Piece, list[int]]]:
        texts = [piece.content for piece in group if isinstance(piece.content, str)]
        made = iter(())
        if texts:
            options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
            made = iter(self._tokenizer(texts, **options)["input_ids"])
        for piece in group:
            ids = list(next(made)) if isinstance(piece.content, str) else _integers(piece.content)
            yield piece, [*self._lead, *ids] if piece.begins and self._bos == "document" else ids


def _sequence(start: tuple[list[int], int], tokens: list[int]) -> TokenSequence:
    return TokenSequence(*start, np.asarray(tokens, dtype=np.int64))


def _integers(content: Any) -> list[int]:
    return content.tolist() if hasattr(content, "tolist") else list(content)


def leading_token(tokenizer: Any) -> int | None:
    """The token that texts begin with: BOS, or where there is none EOS, as in GPT-2; None where there is neither."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def prompt_tokens(tokenizer: Any, text: str) -> Tensor:
    """(pos,) int64: the tokens of a text after the one that texts begin with.

    Raises:
        ConfigError: there is no tokenizer.
    """
    if tokenizer is None:
        raise ConfigError("this model carries no tokenizer: give tokens instead of texts")
    first, ids = leading_token(tokenizer), tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids if first is None else [first, *ids], dtype=torch.int64)


def read_text(source: str | Path | Sequence[str | Path]) -> str:
    """A string as it is; a Path, or a list of paths, read and joined."""
    if isinstance(source, str):
        return source
    files = [source] if isinstance(source, Path) else [Path(file) for file in source]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"no such text file: {', '.join(missing)}")
    return "\n".join(file.read_text(encoding="utf-8") for file in files)
