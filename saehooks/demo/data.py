"""The texts and photos carried in the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
        return _opened(self.images[index])


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


class ImageBatches:
    """Images preprocessed batch by batch; iterating again gives the same batches.

    Args:
        preprocess: a CLIP's preprocess, from a PIL image to a (3, height, width) tensor.
        source: a folder of pictures (searched below too), an ``.npz`` file with ``images`` or ``train_images``
            (n, height, width, 3) uint8, or such an array.
        batch_size: images in a batch.
        limit: at most so many images.
    Raises:
        ConfigError: no pictures there.
    """

    def __init__(
        self,
        preprocess: Callable[[Any], Tensor],
        source: str | Path | np.ndarray,
        *,
        batch_size: int = 64,
        limit: int | None = None,
    ) -> None:
        self._preprocess, self.batch_size = preprocess, batch_size
        self._pictures: Sequence[Any] = _pictures(source)[:limit]
        if not len(self._pictures):
            raise ConfigError(f"no pictures in {source}; give a folder of .png or .jpg files, or an .npz file")

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self._pictures), self.batch_size):
            part = self._pictures[start : start + self.batch_size]
            yield torch.stack([self._preprocess(_opened(picture)) for picture in part])

    def __len__(self) -> int:
        return -(-len(self._pictures) // self.batch_size)

    def __repr__(self) -> str:
        return f"ImageBatches({len(self)} batches, {len(self._pictures)} images)"


def _pictures(source: str | Path | np.ndarray) -> Sequence[Any]:
    """Arrays, or paths of pictures, in a fixed order."""
    if isinstance(source, np.ndarray):
        return list(source)
    path = Path(source)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not path.is_file():
        raise ConfigError(f"no such folder or file: {path}")
    if path.suffix != ".npz":
        raise ConfigError(f"{path} is neither a folder nor an .npz file")
    with np.load(path) as data:
        name = next((name for name in ("images", "train_images") if name in data), None)
        if name is None:
            raise ConfigError(f"{path} holds {', '.join(data)}; expected images or train_images")
        return list(data[name])


def _opened(picture: Any) -> Image:
    from PIL import Image

    return Image.fromarray(picture) if isinstance(picture, np.ndarray) else Image.open(picture).convert("RGB")
