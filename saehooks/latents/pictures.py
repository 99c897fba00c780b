"""The images in which latents are strongest, small enough to keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGEST = 64
"""Pixels of the longer side of what is kept."""


class Pictures:
    """Small copies of images, by their number in the data; those that no latent shows any more are dropped."""

    def __init__(self, mean: Any = None, std: Any = None) -> None:
        self.mean, self.std = mean, std
        """Of the preprocess, one number for each colour; None for images in 0..1."""
        self.kept: dict[int, Tensor] = {}
        """(3, height, width) uint8 by number."""

    def add(self, numbers: list[int], images: Tensor) -> None:
        """Keep images (n, 3, height, width), preprocessed floats."""
        for number, image in zip(numbers, images, strict=True):
            self.kept[number] = _small(self._colours(image.detach().float().cpu()))

    def drop_all_but(self, numbers: set[int]) -> None:
        """Keep only these."""
        self.kept = {number: image for number, image in self.kept.items() if number in numbers}

    def _colours(self, image: Tensor) -> Tensor:
        if self.mean is None:
            return image
        return image * torch.tensor(self.std).view(-1, 1, 1) + torch.tensor(self.mean).view(-1, 1, 1)


def images_of(batch: Any) -> Tensor | None:
    """The images (n, 3, height, width) of a batch, wherever in it they are; None where there are none."""
    if isinstance(batch, Tensor):
        return batch if batch.dim() == 4 and batch.is_floating_point() else None
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    return next((found for part in parts if (found := images_of(part)) is not None), None)


def _small(image: Tensor) -> Tensor:
    longest = max(image.shape[1:])
    if longest > LARGEST:
        size = [max(1, round(side * LARGEST / longest)) for side in image.shape[1:]]
        image = torch.nn.functional.interpolate(image[None], size=size, mode="area")[0]
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def grid_of(model: Any, positions: int) -> list[int] | None:
    """[tokens before the patches, patch rows, patch columns] of a vision tower; None where patches form no grid."""
    size = getattr(getattr(model, "visual", None), "grid_size", None)
    if isinstance(size, (list, tuple)) and len(size) == 2 and positions >= size[0] * size[1]:
        return [positions - size[0] * size[1], int(size[0]), int(size[1])]
    for leading in (1, 0):
        side = round((positions - leading) ** 0.5)
        if side > 1 and side * side == positions - leading:
            return [leading, side, side]
    return None
