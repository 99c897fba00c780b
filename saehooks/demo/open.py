"""Models by name for the command line, each with the text or the images it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saehooks.demo.data import TEXTS, ImageBatches, photos, text
from saehooks.demo.models import quiet, small_clip, smollm2
from saehooks.errors import ConfigError
from saehooks.streams import TokenBatches

PROMPT = "a photo of a {}."


@dataclass(frozen=True)
class Opened:
    """A model, with what is needed to feed it."""

    model: Any
    tokenizer: Any
    preprocess: Any = None
    """From a PIL image to a tensor; None for language models."""

    @property
    def is_clip(self) -> bool:
        """Whether it reads images."""
        return self.preprocess is not None

    def batches(
        self, options: Any, split: str, texts: Sequence[Path] | None, images: Path | None, tokens: int | None
    ) -> TokenBatches | ImageBatches:
        """Batches for a forward pass: the given files, or the packaged text or photos of a split.

        Args:
            options: holds ``context`` and ``sequences``.
            split: ``"train"`` or ``"eval"``.
            texts, images: the user's own.
            tokens: at most so many tokens.
        """
        if self.is_clip:
            own: np.ndarray | Path = (
                photos("train" if split == "train" else "test").images if images is None else images
            )
            return ImageBatches(self.preprocess, own, batch_size=8 * options.sequences)
        if images is not None:
            raise ConfigError("this model reads text: give --text, not --images")
        source = text(split) if texts is None else list(texts)
        return TokenBatches(self.tokenizer, source, context=options.context, batch_size=options.sequences, limit=tokens)

    def source(self, texts: Sequence[Path] | None, images: Path | None, split: str, batches: Any) -> dict[str, Any]:
        """What an SAE should remember of its training data, and of the batches that were made of them."""
        if self.is_clip:
            read: Any = {"images": "saehooks photos (CIFAR-10)" if images is None else images.name}
        else:
            read = {"text": [f"saehooks {TEXTS[split]}"] if texts is None else [file.name for file in texts]}
        return {**read, "batches": repr(batches)}

    def zero_shot(self) -> dict[str, Any]:
        """Prompts and labels of the packaged photos, for `measure`."""
        shots = photos("test")
        prompts = [PROMPT.format(name) for name in shots.class_names]
        return {"prompts": prompts, "labels": shots.labels, "tokenizer": self.tokenizer}


def open_model(name: str, device: str | None = None, dtype: str = "float32") -> Opened:
    """Open a model by name.

    Args:
        name: ``smollm2``, ``tinyclip``, ``open_clip:ARCH/WEIGHTS``, ``open_clip:local-dir:FOLDER``, or a Hugging Face
            hub id or folder.
        device: where to put it, such as ``"cuda:1"``; where its library puts it, if not given.
        dtype: of its weights, ``"float32"`` or ``"bfloat16"``.
    Raises:
        ConfigError: it cannot be opened, or not on that device; says why.
    """
    place = None if device is None else device_named(device)
    opened, wanted = _open(name), getattr(torch, dtype)
    opened.model.to(device=place, dtype=wanted)
    read = opened.preprocess
    if read is None or wanted == torch.float32:
        return opened  # as its library made it: what it does to a picture can then be seen, and undone
    return replace(opened, preprocess=lambda image: read(image).to(wanted))


def device_named(name: str) -> torch.device:
    """A device by name.

    Raises:
        ConfigError: no such device, or none here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ConfigError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}; write cpu") from error
    return device


def _open(name: str) -> Opened:
    if name == "smollm2":
        return Opened(*smollm2())
    if name in ("tinyclip", "clip"):
        model, preprocess, tokenizer = small_clip()
        return Opened(model, tokenizer, preprocess)
    try:
        with quiet():
            return _open_clip(name.removeprefix("open_clip:")) if name.startswith("open_clip:") else _from_hub(name)
    except Exception as error:  # the message of whichever library could not open it
        raise ConfigError(
            f"cannot open model {name!r}: {error}\nwrite smollm2, tinyclip, open_clip:ViT-B-16/openai, or a hub id"
        ) from error


def _open_clip(name: str) -> Opened:
    import open_clip

    architecture, _, weights = (name, "", "") if name.startswith("local-dir:") else name.partition("/")
    model, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=weights or None)
    return Opened(model.eval(), open_clip.get_tokenizer(architecture), preprocess)


def _from_hub(name: str) -> Opened:
    try:
        from transformer_lens.model_bridge import TransformerBridge

        model = TransformerBridge.boot_transformers(name)
    except ImportError:  # TransformerLens 2
        from transformer_lens import HookedTransformer

        model = HookedTransformer.from_pretrained_no_processing(name)
    return Opened(model.eval(), model.tokenizer)
