"""Text as batches of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saehooks.errors import ConfigError


class TokenBatches:
    """Text cut into equal sequences of tokens, batch by batch; iterating again gives the same batches.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: one string, or files to read and join.
        context: tokens in a sequence, the leading BOS included.
        batch_size: sequences in a batch.
        limit: stop after about this many tokens.
    Raises:
        ConfigError: the text is too short for one sequence.
    """

    def __init__(
        self,
        tokenizer: Any,
        text: str | Path | Sequence[str | Path],
        *,
        context: int = 256,
        batch_size: int = 8,
        limit: int | None = None,
    ) -> None:
        if context < 2 or batch_size < 1:
            raise ConfigError(f"need context >= 2 and batch_size >= 1, got context={context}, batch_size={batch_size}")
        text = read_text(text)
        if limit is not None:
            text = text[: limit * 8]  # a token is rarely longer than 8 characters on average: enough, and cheap to cut
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
        n = len(ids) // (context - 1)
        if limit is not None:
            n = min(n, max(1, limit // context))
        if n < 1:
            raise ConfigError(f"the text has {len(ids)} tokens, too few for one sequence of {context}")
        bos = leading_token(tokenizer)
        if bos is None:
            raise ConfigError("this tokenizer has neither a BOS nor an EOS token for sequences to begin with")
        body = ids[: n * (context - 1)].reshape(n, context - 1)
        self.tokens = torch.cat([torch.full((n, 1), bos, dtype=body.dtype), body], dim=1)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tokens.split(self.batch_size))

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.batch_size)

    def __repr__(self) -> str:
        return f"TokenBatches({len(self)} batches, {self.tokens.numel()} tokens in sequences of {self.tokens.shape[1]})"


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
