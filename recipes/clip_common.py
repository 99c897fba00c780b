"""What the CLIP recipes share: labelled photos from the package, an .npz file or folders, and SAEs trained on them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import saehooks as sh
from saehooks.demo import photos as packaged_photos
from saehooks.demo.open import Opened, open_model
from saehooks.errors import ConfigError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SITE = "visual.blocks.4.hook_resid_post"
"""Block 4 of the small CLIP's 0 to 5: after the last block only the class token is read, here patches still matter."""


def say(text: str) -> None:
    """A line for the person who waits; results go to files."""
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------- the command line


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser that knows the model and the photos, as all these recipes ask for them."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="tinyclip", help="tinyclip, open_clip:ARCH/WEIGHTS or open_clip:local-dir:DIR"
    )
    parser.add_argument("--data", help=".npz file or folder of class folders; default: the packaged photos")
    return parser


def open_clip_model(name: str) -> Opened:
    """A CLIP by its name on the command line.

    Raises:
        ConfigError: a language model.
    """
    opened = open_model(name)
    if not opened.is_clip:
        raise ConfigError(f"{name} reads text; this recipe needs a CLIP")
    return opened


# ----------------------------------------------------------------------- photos


@dataclass(frozen=True, eq=False)
class Photos:
    """Labelled pictures, read and preprocessed when they are needed."""

    pictures: Any
    """(n, height, width, 3) uint8, or n paths."""
    labels: Tensor
    """(n,) int64, index into ``names``."""
    names: list[str]
    preprocess: Callable[[Any], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, rows: Any) -> Tensor:
        """(len(rows), 3, height, width), what the model reads."""
        return torch.stack([self.preprocess(_opened(self.pictures[int(row)])) for row in rows])

    def batches(self, size: int = 64, order: Tensor | None = None) -> Iterator[Tensor]:
        """Pixels of all pictures, batch by batch."""
        for part in (torch.arange(len(self)) if order is None else order).split(size):
            yield self.pixels(part)

    def seen(self, row: int) -> np.ndarray:
        """(height, width, 3) uint8, the picture as the model sees it: resized and cropped, so that patches line up."""
        pixels = self.pixels([row])[0]
        for step in getattr(self.preprocess, "transforms", ()):
            if hasattr(step, "mean") and hasattr(step, "std"):
                pixels = pixels * torch.tensor(step.std)[:, None, None] + torch.tensor(step.mean)[:, None, None]
        return (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()

    def first(self, limit: int | None) -> Photos:
        """At most ``limit`` pictures, spread evenly over all."""
        if limit is None or limit >= len(self):
            return self
        rows = torch.linspace(0, len(self) - 1, limit).round().long()
        return Photos([self.pictures[int(row)] for row in rows], self.labels[rows], self.names, self.preprocess)


def load_photos(source: str | None, split: str, preprocess: Callable[[Any], Tensor]) -> Photos:
    """Labelled photos of one split, ``"train"`` or ``"test"``.

    Args:
        source: None for the packaged ones (500 and 200); an ``.npz`` file with ``train_images`` (n, height, width, 3)
            uint8, ``train_labels``, the same for test, and ``class_names``; or a folder of one folder per class, either
            below ``train/`` and ``test/`` (or ``val/``), or directly, every fifth picture of a class then being test.
    Raises:
        ConfigError: no pictures, or arrays that are no pictures; says what was found.
    """
    if source is None:
        found = packaged_photos(split)
        return Photos(found.images, found.labels, found.class_names, preprocess)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, split, preprocess)
    if path.suffix == ".npz" and path.is_file():
        return _from_npz(path, split, preprocess)
    raise ConfigError(f"{source} is neither a folder of class folders nor an .npz file")


def _from_npz(path: Path, split: str, preprocess: Callable[[Any], Tensor]) -> Photos:
    with np.load(path) as data:
        wanted = [f"{split}_images", f"{split}_labels"]
        missing = [name for name in wanted if name not in data]
        if missing:
            raise ConfigError(f"{path} holds {', '.join(data)}; expected {' and '.join(wanted)}")
        images, labels = data[wanted[0]], torch.from_numpy(data[wanted[1]].astype(np.int64)).reshape(-1)
        names = [str(name) for name in data["class_names"]] if "class_names" in data else None
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ConfigError(
            f"{wanted[0]} in {path} is {images.dtype} of shape {images.shape}; expected uint8 (n, height, width, 3)"
        )
    if not len(images) or len(images) != len(labels):
        raise ConfigError(f"{path}: one label per image and at least one: {len(images)} images, {len(labels)} labels")
    names = names or [f"class {i}" for i in range(int(labels.max()) + 1)]
    if int(labels.min()) < 0 or int(labels.max()) >= len(names):
        raise ConfigError(f"{path}: labels run from {labels.min()} to {labels.max()}, but there are {len(names)} names")
    _warn_of_missing(labels, names, split)
    return Photos(images, labels, names, preprocess)


def _from_folder(path: Path, split: str, preprocess: Callable[[Any], Tensor]) -> Photos:
    below = [
        path / name for name in ((split, "val", "valid") if split == "test" else (split,)) if (path / name).is_dir()
    ]
    root = below[0] if below else path
    names = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    files, labels, broken = [], [], []
    for label, name in enumerate(names):
        listed = sorted(file for file in (root / name).rglob("*") if file.suffix.lower() in ENDINGS)
        if not below:
            listed = [file for i, file in enumerate(listed) if (i % 5 == 4) == (split == "test")]
        good = [file for file in listed if _is_readable(file)]
        broken += [file.name for file in listed if file not in good]
        files, labels = files + good, labels + [label] * len(good)
    if broken:
        say(f"left out {len(broken)} pictures that cannot be read: {', '.join(broken[:5])}")
    if not files:
        raise ConfigError(f"no pictures in {root}; expected one folder per class, with {', '.join(ENDINGS)} files")
    _warn_of_missing(torch.tensor(labels), names, split)
    return Photos(files, torch.tensor(labels), [name.replace("_", " ") for name in names], preprocess)


def _is_readable(file: Path) -> bool:
    try:
        with Image.open(file) as picture:
            picture.verify()
        return True
    except (OSError, SyntaxError):
        return False


def _warn_of_missing(labels: Tensor, names: list[str], split: str) -> None:
    empty = [
        name for name, n in zip(names, torch.bincount(labels, minlength=len(names)).tolist(), strict=True) if not n
    ]
    if empty:
        say(f"no {split} pictures of {', '.join(empty)}: those classes keep their prompt and get no row")


def _opened(picture: Any) -> Image.Image:
    return Image.fromarray(picture) if isinstance(picture, np.ndarray) else Image.open(picture).convert("RGB")


# ----------------------------------------------------------------------- training


def train_saes(
    clip: Any, saes: dict[str, sh.SAE], photos: Photos, *, losses: dict[str, Any], at: str = SITE, copies: int = 3,
    patches: int = 12, passes: int = 3, seed: int = 0,
) -> None:  # fmt: skip
    """Train several SAEs in place on the same forwards, each through a hook of its own.

    A picture has one class token among many patches, and the class token is what CLIP reads in the end. So of each
    picture the class token and a few random patches are learned from: else the SAE spends nearly all on patches.

    Args:
        losses: the `LossConfig` of those SAEs that do not take their default.
        copies: how often each picture is shown, all but the first time shifted and perhaps mirrored.
        patches: random patches of each picture to learn from.
        passes: how often an activation is used.
    """
    steps = max(1, copies * len(photos) * (1 + patches) * passes // 1024)
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as blocks, torch.no_grad():
        trainers = {
            name: blocks.enter_context(
                sh.train(clip, sae, at=at, where=class_token_and(patches, seed), loss=losses.get(name), steps=steps,
                         passes=passes, lr=2e-3, seed=seed)
            )
            for name, sae in saes.items()
        }  # fmt: skip
        for copy in range(copies):
            order = torch.randperm(len(photos), generator=generator)
            for done, pixels in enumerate(photos.batches(64, order), 1):
                clip.encode_image(shifted(pixels, generator) if copy else pixels)
                if done % 20 == 0:
                    state = ", ".join(f"{name} {trainer.latest('nmse') or 1:.3f}" for name, trainer in trainers.items())
                    say(f"training: copy {copy + 1} of {copies}, {64 * done} pictures; NMSE {state}")
    for sae in saes.values():
        sae.cfg.metadata["training"]["positions"] = f"the class token and {patches} random patches of each picture"
        sae.cfg.metadata["training"]["pictures"] = f"{len(photos)}, {copies} times, shifted and mirrored"


def class_token_and(patches: int, seed: int) -> Callable[[Any, Any], Tensor]:
    """A where-rule: position 0, and random others of each picture."""
    generator = torch.Generator().manual_seed(seed)

    def where(tokens: Any, codes: Any) -> Tensor:
        order = torch.rand(codes.shape, generator=generator)
        order[:, 0] = -1.0
        kept = order.argsort(dim=1)[:, : patches + 1]
        return torch.zeros(codes.shape, dtype=torch.bool).scatter(1, kept, True)

    return where


def shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (n, 3, height, width) moved by up to a tenth of their size, borders mirrored, half of them flipped."""
    n, _, height, width = pixels.shape
    margin = max(1, height // 10)
    wide = torch.nn.functional.pad(pixels, (margin,) * 4, mode="reflect")
    moves = torch.randint(0, 2 * margin + 1, (n, 2), generator=generator).tolist()
    mirrored = (torch.rand(n, generator=generator) < 0.5).tolist()
    crops = [wide[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(moves)]
    return torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, mirrored, strict=True)])
