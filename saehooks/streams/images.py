"""Pictures as batches for an image model: folders, files, arrays and datasets, each shown as it looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saehooks.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = ["jpg", "jpeg", "jfif", "png", "bmp", "tif", "tiff", "webp", "gif", "ppm", "pgm", "avif", "jp2"]
ARRAYS = ("images", "train_images")
"""Names under which an .npz file may hold its pictures."""


class ImageBatches:
    """Pictures preprocessed batch by batch; iterating again gives the same batches.

    Pictures are shown as they look: turned as their camera says, 16-bit brightness kept, transparency over white.

    Args:
        preprocess: of a CLIP or a torchvision model: from a PIL image to a (3, height, width) tensor.
        source: a folder (searched below too) or a list of picture files; an ``.npz`` file with ``images`` or
            ``train_images``, or an ``.npy`` file, which is not read into memory; an array or tensor of shape
            (n, height, width, 3) or (n, 3, height, width), uint8, uint16 or float in 0 .. 1; or anything with a length
            whose items are pictures, (picture, label) pairs or dicts with ``"image"``, such as a dataset.
        batch_size: pictures in a batch.
        limit: at most so many pictures.
        workers: processes that read and preprocess beside the model; 0 for none. Batches are the same.
    Raises:
        ConfigError: no pictures there, or an array that is not one of pictures; while iterating, a picture that cannot
            be read, by its name.

    >>> batches = ImageBatches(lambda image: torch.zeros(3, 8, 8), np.zeros((5, 8, 8, 3), np.uint8), batch_size=2)
    >>> [tuple(batch.shape) for batch in batches]
    [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    """

    def __init__(
        self,
        preprocess: Callable[[Any], Tensor],
        source: Any,
        *,
        batch_size: int = 64,
        limit: int | None = None,
        workers: int = 0,
    ) -> None:
        if batch_size < 1 or workers < 0 or (limit is not None and limit < 1):
            raise ConfigError(f"need batch_size, limit >= 1 and workers >= 0, got {batch_size}, {limit}, {workers}")
        self._pictures = _Preprocessed(preprocess, *_pictures(source), limit)
        self.batch_size, self.workers = batch_size, workers
        if not len(self._pictures):
            endings = ", ".join(f".{ending}" for ending in ENDINGS[:8])
            raise ConfigError(
                f"no pictures in {_named(source)}; give a folder of pictures ({endings}), or an .npz file"
            )

    def __iter__(self) -> Iterator[Tensor]:
        return self.from_batch(0)

    def from_batch(self, number: int) -> Iterator[Tensor]:
        """The batches (n, 3, height, width) from number ``number`` on, without reading those before it."""
        starts = range(number * self.batch_size, len(self._pictures), self.batch_size)
        groups = [list(range(start, min(start + self.batch_size, len(self._pictures)))) for start in starts]
        loader = torch.utils.data.DataLoader(
            self._pictures, batch_sampler=groups, num_workers=self.workers, collate_fn=_stacked
        )
        for batch in loader:
            if isinstance(batch, ConfigError):
                raise batch
            yield batch

    @property
    def identity(self) -> str:
        """What tells these batches from others."""
        return f"{self!r} of {self._pictures.name}, batch_size={self.batch_size}"

    def __len__(self) -> int:
        return -(-len(self._pictures) // self.batch_size)

    def __repr__(self) -> str:
        return f"ImageBatches({len(self)} batches, {len(self._pictures)} images)"


class _Preprocessed(torch.utils.data.Dataset):
    """Pictures by number, preprocessed; one that cannot be read gives the error, so that no worker dies of it."""

    def __init__(
        self, preprocess: Callable[[Any], Tensor], pictures: Sequence[Any], name: str, limit: int | None
    ) -> None:
        self._preprocess, self._pictures, self.name = preprocess, pictures, name
        self._length = len(pictures) if limit is None else min(limit, len(pictures))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor | ConfigError:
        name = f"picture {index} of {self.name}"
        try:
            picture = _taken_out(self._pictures[index])
            name = str(picture) if isinstance(picture, (str, Path)) else name
            return self._preprocess(opened(picture))
        except Exception as error:  # of whichever library could not read it
            return ConfigError(f"{name} cannot be read as a picture: {error}")


def _stacked(items: list[Tensor | ConfigError]) -> Tensor | ConfigError:
    broken = next((item for item in items if isinstance(item, ConfigError)), None)
    if broken is not None:
        return broken
    try:
        return torch.stack(items)  # type: ignore[arg-type]
    except (RuntimeError, TypeError) as error:
        return ConfigError(f"preprocess must give tensors of one shape: {error}")


def opened(picture: Any) -> Image:
    """A picture in RGB as it looks, from a file, an array (height, width, 3) uint8, or a PIL image."""
    from PIL import Image, ImageOps

    if isinstance(picture, (str, Path)):
        with Image.open(picture) as file:
            file.load()
            return opened(file)
    if isinstance(picture, (np.ndarray, Tensor)):
        return Image.fromarray(_as_bytes(np.asarray(picture)[None])[0])
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        picture = Image.fromarray(_brightness(np.asarray(picture)))
    if "A" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _brightness(values: np.ndarray) -> np.ndarray:
    """(height, width) uint8 from 16-bit integers, which Pillow may hold in 32, or floats in 0 .. 1."""
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.round(values * 255).astype(np.uint8)
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        return np.round(values / 257).astype(np.uint8)
    raise ConfigError(
        f"its brightness runs from {low} to {high} in {values.dtype}; expected 16-bit, or floats in 0 .. 1"
    )


def _taken_out(item: Any) -> Any:
    """The picture of an item of a dataset: itself, the first of a pair, or what a dict holds as an image."""
    if isinstance(item, Mapping):
        name = next((name for name in ("image", "img", "picture", "pixel_values") if name in item), None)
        if name is None:
            raise ConfigError(f"the dataset has the columns {', '.join(map(str, item))}, expected 'image'")
        item = item[name]
    elif isinstance(item, (tuple, list)) and item:
        item = item[0]
    return item


def _named(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__


def _pictures(source: Any) -> tuple[Sequence[Any], str]:
    """Pictures by number in a fixed order, and what to call where they came from."""
    if isinstance(source, (np.ndarray, Tensor)):
        return _Array(np.asarray(source), "the array"), "the array"
    if not isinstance(source, (str, Path)):
        if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
            raise ConfigError(f"pictures cannot be read from {type(source).__name__}; give a folder, files or an array")
        return source, type(source).__name__
    path = Path(source)
    if path.is_dir():
        wanted = {f".{ending}" for ending in ENDINGS}
        files = (file for file in path.rglob("*") if file.suffix.lower() in wanted and not file.name.startswith("."))
        return sorted(files), str(path)
    if not path.is_file():
        raise ConfigError(f"no such folder or file: {path}")
    if path.suffix == ".npy":
        return _Array(np.load(path, mmap_mode="r", allow_pickle=False), str(path)), str(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as data:
            name = next((name for name in ARRAYS if name in data), None)
            if name is None:
                raise ConfigError(f"{path} holds {', '.join(data)}; expected {' or '.join(ARRAYS)}")
            return _Array(data[name], str(path)), str(path)
    if path.suffix.lower().removeprefix(".") in ENDINGS:
        return [path], str(path)
    raise ConfigError(f"{path} is neither a folder, a picture, nor an .npz or .npy file")


class _Array(Sequence[Any]):
    """Pictures in one array, each made (height, width, 3) uint8 when it is asked for."""

    def __init__(self, array: np.ndarray, name: str) -> None:
        self._array = array
        try:
            _as_bytes(array[:1])
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: Any) -> Any:
        return _as_bytes(self._array[index : index + 1])[0]


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """(n, height, width, 3) or (n, height, width, 4) uint8 of pictures in any of the usual layouts and dtypes."""
    expected = "expected (n, height, width, 3) or (n, 3, height, width)"
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        array = array[..., None]
    if array.ndim != 4:
        raise ConfigError(f"an array of shape {array.shape}; {expected}")
    last, first = array.shape[-1] in (1, 3, 4), array.shape[1] in (1, 3, 4)
    if last == first:
        raise ConfigError(f"which axis of {array.shape} holds the colours cannot be told; {expected}")
    array = array.transpose(0, 2, 3, 1) if first else array
    array = array.repeat(3, -1) if array.shape[-1] == 1 else array
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return np.round(array / 257).astype(np.uint8)
    if array.dtype.kind == "f" and (not array.size or (array.min() >= 0 and array.max() <= 1)):
        return np.round(array * 255).astype(np.uint8)
    span = f" from {array.min():.4g} to {array.max():.4g}" if array.size else ""
    raise ConfigError(
        f"pictures in {array.dtype}{span}; expected uint8, uint16, or floats in 0 .. 1 (what a preprocess already made "
        "is given to the model as it is: [tensor, ...] in place of ImageBatches)"
    )
