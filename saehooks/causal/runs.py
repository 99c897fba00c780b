"""Data in, outputs out: batches of equal length, and a forward of any model family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saehooks.errors import ConfigError
from saehooks.hosts import Host, Site
from saehooks.streams import AFTER_FIRST

TOKENS_AT_ONCE = 1024
"""Tokens in a forward by default: enough to keep two cores or a GPU busy, and logits within 200 MB."""

IMAGES_AT_ONCE = 64

DEFAULT = "default"
"""``where=`` when nothing is said: all but position 0 where the model reads tokens, everywhere for images."""


class Inputs(NamedTuple):
    """Part of the data: sequences of one length, or images."""

    inputs: Tensor
    """(batch, pos) tokens, or (batch, 3, height, width) images."""
    rows: Tensor
    """(batch,) int64, their numbers in the data."""


class Data(NamedTuple):
    """All of the data, cut into batches."""

    batches: list[Inputs]
    total: int
    """Number of sequences or images."""


def as_data(host: Host, given: Any, batch_size: int | None = None) -> Data:
    """Cut data into batches of equal length.

    Args:
        given: (n, pos) tokens; (n, 3, height, width) images; a list of texts, which the model's own tokenizer reads
            and a BOS opens; a list of token lists; or batches of any of the tensors, as a loader gives them.
        batch_size: sequences in a forward; by default as many as make about 1,024 tokens, or 64 images.
    Raises:
        ConfigError: there is nothing in it, or something else.
    """
    pieces = list(_pieces(host, given))
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for row, piece in enumerate(pieces):
        by_shape.setdefault(tuple(piece.shape), []).append(row)
    if not pieces or any(not piece.numel() for piece in pieces):
        raise ConfigError("there is nothing to measure: the data holds no sequence, or an empty one")
    batches = []
    for shape, rows in by_shape.items():
        size = batch_size or rows_at_once(shape)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batches.append(Inputs(torch.stack([pieces[row] for row in part]), torch.tensor(part)))
    return Data(batches, len(pieces))


def rows_at_once(shape: tuple[int, ...]) -> int:
    """Sequences of one shape in a forward, when nothing is said."""
    return max(1, TOKENS_AT_ONCE // shape[0]) if len(shape) == 1 else IMAGES_AT_ONCE


def _pieces(host: Host, given: Any) -> Iterator[Tensor]:
    """One tensor for each sequence (pos,) or image (3, height, width)."""
    if isinstance(given, Tensor):
        if given.dim() not in (2, 4):
            raise ConfigError(f"data must be tokens (n, pos) or images (n, 3, height, width), got {tuple(given.shape)}")
        yield from given
        return
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, Iterable):
        raise ConfigError(f"data must be tokens, images, texts or batches of them, got {type(given).__name__}")
    for one in given:
        if isinstance(one, str):
            yield prompt_tokens(host.tokenizer, one)
        elif isinstance(one, Tensor) and one.dim() == 1:
            yield one
        elif isinstance(one, (list, tuple)) and one and isinstance(one[0], int):
            yield torch.tensor(one)
        else:  # a batch, or a loader's (images, labels)
            batch = one[0] if isinstance(one, (list, tuple)) and one else one
            if not isinstance(batch, Tensor):
                raise ConfigError(f"data must be tokens, images, texts or batches of them, got {type(one).__name__}")
            yield from _pieces(host, batch)


def prompt_tokens(tokenizer: Any, text: str) -> Tensor:
    """(pos,) int64: the tokens of a text after a BOS.

    Raises:
        ConfigError: there is no tokenizer.
    """
    if tokenizer is None:
        raise ConfigError("this model carries no tokenizer: give tokens instead of texts")
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return torch.tensor([bos, *tokenizer(text, add_special_tokens=False).input_ids])


def default_where(host: Host, site: Site, where: Any) -> Any:
    """All but position 0 by default where tokens are read, everywhere for images."""
    if not (isinstance(where, str) and where == DEFAULT):
        return where
    return None if host.tower(site) == "visual" else AFTER_FIRST


def runner(host: Host, run: Callable[[Tensor], Any] | None = None) -> Callable[[Tensor], Tensor]:
    """A function from inputs to the output that metrics see: logits, or embeddings of a CLIP."""
    model: Any = host.model
    if run is not None:
        call: Callable[[Tensor], Any] = run
    elif host.family == "transformer_lens":
        call = lambda inputs: model(inputs, return_type="logits")  # noqa: E731
    elif host.family == "open_clip":
        call = host.run
    else:
        options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        call = lambda inputs: model(inputs, **options)  # noqa: E731
    return lambda inputs: _tensor_of(call(host.beside(inputs)))


def _tensor_of(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    candidates = found if isinstance(found, (tuple, list)) else (found,)
    tensor = next((one for one in candidates if isinstance(one, Tensor)), None)
    if tensor is None:
        raise ConfigError(
            f"the model returned {type(output).__name__} without a tensor; pass run=, a function from inputs to output"
        )
    return tensor
