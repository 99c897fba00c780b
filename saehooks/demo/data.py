"""The texts and photos carried in the package."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saehooks.errors import ConfigError
from saehooks.streams import ImageBatches
from saehooks.streams.images import opened

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ASSETS", "TEXTS", "ImageBatches", "Photos", "photos", "text"]

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
        return opened(self.images[index])


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
