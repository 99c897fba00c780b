"""Folders of `cfg.json` and `sae_weights.safetensors`, written so that a crash at any moment leaves a readable one."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from saehooks.errors import FormatError

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_folder(folder: str | Path, config: Mapping, tensors: Mapping[str, Tensor]) -> None:
    """Write config and tensors; other files in the folder stay as they are.

    The weights file carries the config too and is replaced first, so a crash between the two files leaves the new
    weights with their own config.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"cannot save to {folder}: it is a file; give the name of a folder")
    folder.mkdir(parents=True, exist_ok=True)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    weights = to_bytes(ready, metadata={"cfg": json.dumps(config)})
    write_file(folder / WEIGHTS, weights)
    signed = {**config, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    write_file(folder / CONFIG, (json.dumps(signed, indent=2) + "\n").encode())


def read_folder(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Config and tensors of a folder written by `write_folder`, or by a tool that uses the same two files.

    Raises:
        FormatError: a file is missing, truncated, altered, or a pickle in place of safetensors.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    tensors, embedded = read_safetensors(folder / WEIGHTS)
    signature = config.pop("weights_sha256", None)
    if signature is None or signature == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest():
        return config, tensors
    if embedded is not None and embedded != config:
        return embedded, tensors  # a save was cut off between the two files: the weights know their own config
    raise FormatError(f"{folder / WEIGHTS} was altered after it was saved: its checksum is not the one in {CONFIG}")


def read_json(path: Path) -> dict:
    """A JSON object from a file, with errors that name the file."""
    if not path.is_file():
        raise FormatError(f"no {path.name} in {path.parent}; an SAE folder holds {CONFIG} and {WEIGHTS}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not readable JSON ({error}); the file is corrupt or cut off") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds a {type(found).__name__}, expected an object of settings")
    return found


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict | None]:
    """Tensors of a safetensors file and the config embedded in it, if any."""
    if not path.is_file():
        raise FormatError(f"no {path.name} in {path.parent}; an SAE folder holds {CONFIG} and {WEIGHTS}")
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file opens with the length of its header, whose bytes can be any, and the header's brace.
    if head[8:] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80"):
        raise FormatError(f"{path} is a pickle, not safetensors; it was not opened, since a pickle can run code")
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            text = (file.metadata() or {}).get("cfg")
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path} is not a readable safetensors file ({error}); it is corrupt or cut off") from error
    return tensors, json.loads(text) if text else None


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a name such as ``"float32"`` or ``"torch.bfloat16"``."""
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise FormatError(f"dtype {name!r} is not a floating torch dtype such as 'float32' or 'bfloat16'")
    return found
