"""The texts and photos carried in the package, and text cut into batches of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saehooks.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

ASSETS = Path(__file__).parent / "assets"
"""Folder of everything the demo runs on; its README names sources and licences."""

TEXTS = {"train": "wikipedia_train.txt", "eval": "wikitext2_test.txt"}


class Photos(NamedTuple):
    """Small labelled photos."""

    images: np.ndarray
    """(n, 32, 32, 3) uint8."""
    labels: Tensor
    """(n,) int64, index into ``class_names``."""
    class_names: list[str]
    """Ten names, "airplane" to "truck"."""

    def pil(self, index: int) -> Image:
        """One photo as a PIL image, what a CLIP preprocess expects."""
        from PIL import Image

        return Image.fromarray(self.images[index])


@cache
def text(name: str) -> str:
    """Read one of the packaged texts: ``"train"`` (Wikipedia) or ``"eval"`` (WikiText-2 test).

    Raises:
        ConfigError: another name was given.

    >>> text("eval").splitlines()[2][:25]
    'His father died around 74'
    """
    if name not in TEXTS:
        raise ConfigError(f"no packaged text {name!r}; write one of {', '.join(map(repr, TEXTS))}")
    return (ASSETS / "text" / TEXTS[name]).read_text(encoding="utf-8")


@cache
def photos(split: str) -> Photos:
    """Read the packaged photos: ``"train"`` (500) or ``"test"`` (200), equally many of each class.

    Raises:
        ConfigError: another split was given.

    >>> photos("test").images.shape
    (200, 32, 32, 3)
    """
    if split not in ("train", "test"):
        raise ConfigError(f"no photos {split!r}; write 'train' or 'test'")
    with np.load(ASSETS / "photos" / "cifar10_700.npz") as data:
        labels = torch.from_numpy(data[f"{split}_labels"])
        return Photos(data[f"{split}_images"], labels, [str(name) for name in data["class_names"]])


def token_batches(
    tokenizer: Any,
    texts: str | Iterable[str],
    *,
    context: int = 128,
    batch_size: int = 8,
    max_tokens: int | None = None,
) -> Iterator[Tensor]:
    """Cut text into batches of equally long token sequences, in reading order.

    Lines are tokenised one group at a time and joined, so that a sequence starts where the last one
    ended. What is left over at the end and does not fill a sequence is dropped.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: one text, or an iterable of texts (files, paragraphs).
        context: tokens in a sequence.
        batch_size: sequences in a batch; the last batch may hold fewer.
        max_tokens: stop after this many tokens, rounded up to a whole sequence.
    Returns:
        Iterator of (batch, context) int64 tokens.
    Raises:
        ConfigError: ``context`` or ``batch_size`` below 1, or the text is shorter than one sequence.
    """
    if context < 1 or batch_size < 1:
        raise ConfigError(f"context and batch_size must be at least 1, got {context} and {batch_size}")
    limit = None if max_tokens is None else -(-max_tokens // context)
    return _batched(_sequences(tokenizer, [texts] if isinstance(texts, str) else texts, context, limit), batch_size)


def _sequences(tokenizer: Any, texts: Iterable[str], context: int, limit: int | None) -> Iterator[Tensor]:
    """Token sequences of ``context`` tokens, ``limit`` of them at most."""
    left: list[int] = []
    made = 0
    for piece in _pieces(texts):
        left += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        while len(left) >= context:
            if limit is not None and made >= limit:
                return
            yield torch.tensor(left[:context])
            left, made = left[context:], made + 1
    if not made:
        raise ConfigError(
            f"the text has {len(left)} tokens, one sequence needs {context}; give more text or a smaller context"
        )


def _pieces(texts: Iterable[str], characters: int = 20_000) -> Iterator[str]:
    """Groups of whole lines of about ``characters``, so that a long text is never tokenised at once."""
    for whole in texts:
        group, size = [], 0
        for line in whole.splitlines(keepends=True):
            group.append(line)
            size += len(line)
            if size >= characters:
                yield "".join(group)
                group, size = [], 0
        if group:
            yield "".join(group)


def _batched(rows: Iterator[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Stack equally long rows, ``batch_size`` at a time."""
    batch: list[Tensor] = []
    for row in rows:
        batch.append(row)
        if len(batch) == batch_size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)
