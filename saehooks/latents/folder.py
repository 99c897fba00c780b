"""Folders of an index: one safetensors file that knows its own description, and the description as JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes
from torch import Tensor

from saehooks.errors import FormatError
from saehooks.storage import read_safetensors, write_file

INDEX, PARTIAL = "index", "survey"
VERSION = 1


def write_index(folder: str | Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an index, tensors of any shape by name; a crash at any moment leaves the old one or the new one."""
    _write(Path(folder), INDEX, description, tensors)


def write_partial(folder: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint of a survey, tensors of any shape by name."""
    _write(folder, PARTIAL, description, tensors)


def remove_partial(folder: Path) -> None:
    """Remove the checkpoint of a survey that is complete."""
    for suffix in (".json", ".safetensors"):
        (folder / f"{PARTIAL}{suffix}").unlink(missing_ok=True)


def read_tensors(folder: str | Path, partial: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors, of any shape by name, of an index or of the checkpoint of a survey.

    Raises:
        FormatError: there is none, or it is damaged, or of a later version.
    """
    folder = Path(folder)
    name = PARTIAL if partial else INDEX
    if not (folder / f"{name}.safetensors").is_file():
        what = "an interrupted survey" if partial else "an index of latents"
        hint = "write resume=False to begin one" if partial else "sh.survey(model, sae, batches, folder=...) writes one"
        if not partial and (folder / f"{PARTIAL}.safetensors").is_file():
            hint = "its survey was interrupted; sh.survey(..., folder=..., resume=True) goes on with it"
        if partial and (folder / f"{INDEX}.safetensors").is_file():
            hint = "its survey is complete; sh.LatentIndex.load(folder) reads it, and resume=False begins another"
        raise FormatError(f"{folder} does not hold {what}: {hint}")
    tensors, description = read_safetensors(folder / f"{name}.safetensors")
    if not isinstance(description, dict) or description.get("format") != "saehooks latents":
        raise FormatError(f"{folder / name}.safetensors is not an index of latents")
    if description["version"] > VERSION:
        raise FormatError(f"{folder} was written by a later version of saehooks; upgrade saehooks to read it")
    return description, tensors


def _write(folder: Path, name: str, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"cannot save to {folder}: it is a file; give the name of a folder")
    folder.mkdir(parents=True, exist_ok=True)
    full = {"format": "saehooks latents", "version": VERSION, **description}
    ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_file(folder / f"{name}.safetensors", to_bytes(ready, metadata={"cfg": json.dumps(full)}))
    write_file(folder / f"{name}.json", (json.dumps(full, indent=1, ensure_ascii=False) + "\n").encode())
