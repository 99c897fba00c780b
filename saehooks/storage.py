"""Safetensors and folders of `cfg.json` and `sae_weights.safetensors`: nothing is read before its size is known.

A folder is written so that a crash at any moment leaves a readable one: the weights carry their own config and their
own checksum, and are replaced first. Tensors are written and read one after the other, never all at once.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from saehooks.errors import FormatError, StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
CHECKSUM = "weights_checksum"
TRANSPOSED = ".T"
"""Ends the name of a matrix that is stored as its transpose, in the order in which it lies in memory."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNFINISHED = ".saehooks-part"
"""How the name of a file ends that is being written, beside the one whose place it will take."""
MOST_HEADER = 100 * 2**20
"""Bytes of the longest header that is read."""
MOST_JSON = 64 * 2**20
"""Bytes of the longest config that is read."""
BLOCK = 2**16
"""Bytes that are summed before they enter a checksum."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, not read yet: its shape and type are known, and that the file holds all of its bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[..., Tensor] = field(repr=False)
    """Reads it, or with ``read(first, stop)`` some of its rows alone; the tensor owns its memory."""

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return prod(self.shape) * self.dtype.itemsize


# ------------------------------------------------------------------- writing


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` when it is whole, and not before.

    Raises:
        StorageError: the disk is full, or the folder takes no files; what was there stays.
    """
    try:
        with _beside(path) as file:
            yield file
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; what was there stays") from error


@contextmanager
def _beside(path: Path) -> Iterator[BinaryIO]:
    remove_abandoned(path)
    handle, name = locked_file(path)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def locked_file(path: Path) -> tuple[int, str]:
    """A new file beside a path, open and locked, so that no other process takes it for abandoned."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
        if fcntl is not None:
            with suppress(OSError):  # a network drive without locks
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)  # removed before it was locked


def remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed while they wrote this file have left: nobody holds its lock any more."""
    if fcntl is None:
        return
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{UNFINISHED}"):
        with suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    with _replacing(path) as file:
        file.write(data)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write tensors, of any shape, one after the other, so that no second copy of them all is needed.

    Args:
        path: replaced when the new file is whole.
        tensors: on any device; those that are not contiguous are copied one at a time.
        metadata: text of the header; the checksum is added to it.
    Returns:
        The checksum of the tensors.
    """
    header = header_of({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, metadata)
    with _replacing(path) as file:
        file.write(header_bytes(header))
        sums = {}
        for name in list(header)[1:]:
            data = bytes_of(tensors[name].detach().cpu().contiguous())
            sums[name] = block_sums(data)
            file.write(data.numpy().data)
        header["__metadata__"][CHECKSUM] = checksum_of(sums)  # as long as the zeros that it replaces
        file.seek(0)
        file.write(header_bytes(header))
    return header["__metadata__"][CHECKSUM]


def header_of(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> dict:
    """The header of a safetensors file: where each tensor lies, of which dtype and shape, and room for a checksum."""
    header: dict[str, Any] = {"__metadata__": {**metadata, CHECKSUM: "0" * 64}}
    start = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        if dtype not in NAMES:
            raise FormatError(f"{name} is {dtype}, which safetensors files do not hold")
        stop = start + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    return header


def header_bytes(header: dict) -> bytes:
    """The header as it stands at the beginning of the file."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_folder(folder: str | Path, config: Mapping, tensors: Mapping[str, Tensor], *, in_order: bool = False) -> None:
    """Write config and tensors, of any shape; other files in the folder stay as they are.

    The weights file carries the config too and is replaced first, so a crash between the two files leaves the new
    weights with their own config.

    Args:
        folder: made if missing.
        config: for `cfg.json`.
        tensors: by name.
        in_order: store a matrix whose memory holds its transpose as that transpose, under a name that ends in ``.T``.
            Saving and loading then copy no matrix only to turn it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"cannot save to {folder}: it is a file; give the name of a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror or error}; give another folder") from error
    if in_order:
        tensors = dict(as_in_memory(name, tensor) for name, tensor in tensors.items())
    checksum = write_safetensors(folder / WEIGHTS, tensors, {"cfg": json.dumps(config)})
    signed = {**config, CHECKSUM: checksum}
    write_file(folder / CONFIG, (json.dumps(signed, indent=2) + "\n").encode())


def as_in_memory(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A tensor in the order in which it lies in memory, and the name it is stored under."""
    turned = tensor.dim() == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous()
    return (name + TRANSPOSED, tensor.T) if turned else (name, tensor)


# ------------------------------------------------------------------- reading


@dataclass(frozen=True)
class SafetensorsFile:
    """What a safetensors file holds; no tensor is read yet."""

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]

    @property
    def config(self) -> dict | None:
        """The config that `write_folder` put into the header, if it did."""
        text = self.metadata.get("cfg")
        return None if text is None else parse_json(text, f"the header of {self.path}")

    def read(self) -> dict[str, Tensor]:
        """All tensors.

        Raises:
            FormatError: they are not those that were written.
        """
        expected = self.metadata.get(CHECKSUM)
        tensors, sums = {}, {}
        for name, stored in self.tensors.items():
            tensors[name] = stored.read()
            if expected is not None:
                sums[name] = block_sums(bytes_of(tensors[name]))
        if expected is not None and checksum_of(sums) != expected:
            raise FormatError(f"{self.path} was altered after it was saved: its checksum is not the one in its header")
        return {
            name.removesuffix(TRANSPOSED): tensor.T if name.endswith(TRANSPOSED) else tensor
            for name, tensor in tensors.items()
        }


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read the header of a safetensors file and check it against the file.

    Raises:
        FormatError: no such file, another kind of file, cut off, or tensors that do not lie one after the other in it.
    """
    if not path.is_file():
        raise FormatError(f"no {path.name} in {path.parent}; an SAE folder holds {CONFIG} and {WEIGHTS}")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(9)
        # A safetensors file opens with the length of its header, whose bytes can be any, and the header's brace.
        if head[8:] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80"):
            raise FormatError(f"{path} is a pickle, not safetensors; it was not opened, since a pickle can run code")
        length = int.from_bytes(head[:8], "little")
        if len(head) < 9 or length > min(size - 8, MOST_HEADER):
            raise _unreadable(path, "its header is longer than the file")
        file.seek(8)
        text = file.read(length)
    header = parse_json(text, f"the header of {path}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _unreadable(path, "its metadata are not text")
    start = 8 + length
    tensors, ends = {}, [0]
    for name, entry in sorted(header.items(), key=lambda item: _first_offset(item[1])):
        dtype, shape, offsets = _entry(path, name, entry)
        if offsets[0] != ends[-1] or offsets[1] - offsets[0] != prod(shape) * dtype.itemsize:
            raise _unreadable(path, f"{name} does not lie where its shape says")
        ends.append(offsets[1])
        tensors[name] = StoredTensor(shape, dtype, _reader(path, start + offsets[0], shape, dtype))
    if start + ends[-1] != size:
        raise _unreadable(path, f"its tensors take {ends[-1]} bytes, it holds {size - start}")
    return SafetensorsFile(path, tensors, metadata)


def _unreadable(path: Path, why: str) -> FormatError:
    return FormatError(f"{path} is not a readable safetensors file ({why}); it is corrupt or cut off")


def _first_offset(entry: Any) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    first = offsets[0] if isinstance(offsets, list) and offsets else None
    return first if type(first) is int else -1


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], list[int]]:
    """Type, shape and place of a tensor."""
    found = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (found.get(key) for key in ("dtype", "shape", "data_offsets"))
    whole = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not whole or not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):  # type: ignore[misc]
        raise _unreadable(path, f"its header does not say where {name} lies")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _unreadable(path, f"{name} has the type {dtype!r}, which is none of {', '.join(DTYPES)}")
    return DTYPES[dtype], tuple(shape), offsets  # type: ignore[arg-type,return-value]


def _reader(path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[..., Tensor]:
    def read(first: int = 0, stop: int | None = None) -> Tensor:
        wanted = shape if stop is None else (stop - first, *shape[1:])
        tensor = torch.empty(wanted, dtype=dtype)
        rest = bytes_of(tensor).numpy().data
        with path.open("rb", buffering=0) as file:
            file.seek(start + first * prod(shape[1:]) * dtype.itemsize)
            while len(rest):
                got = file.readinto(rest)  # type: ignore[attr-defined]
                if not got:
                    raise _unreadable(path, "it became shorter while it was read")
                rest = rest[got:]
        return tensor

    return read


def bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, (bytes,) uint8."""
    return tensor.reshape(-1).view(torch.uint8)


def block_sums(data: Tensor) -> bytes:
    """Sums of 64-bit words, modulo 2^64, of each block of bytes, and the bytes after the last whole block."""
    whole = len(data) // BLOCK * BLOCK
    if whole and data.data_ptr() % 8:
        data = data.clone()
    sums = data[:whole].view(torch.int64).reshape(-1, BLOCK // 8).sum(1) if whole else data.new_zeros(0)
    return sums.numpy().tobytes() + data[whole:].numpy().tobytes()


def checksum_of(sums: Mapping[str, bytes]) -> str:
    total = hashlib.sha256()
    for name in sorted(sums):
        total.update(f"{name}\0{len(sums[name])}\0".encode())
        total.update(sums[name])
    return total.hexdigest()


@dataclass(frozen=True)
class Folder:
    """A folder of config and tensors; no tensor is read yet."""

    config: dict
    weights: SafetensorsFile
    digest: str | None = None
    """The sha256 of the weights file, which folders of earlier versions carry."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that `read` gives."""
        return {
            name.removesuffix(TRANSPOSED): stored.shape[::-1] if name.endswith(TRANSPOSED) else stored.shape
            for name, stored in self.weights.tensors.items()
        }

    def read(self) -> dict[str, Tensor]:
        """All tensors, of the `shapes`, after a check that they are those that were saved."""
        if self.digest is not None:
            total = hashlib.sha256()
            with self.weights.path.open("rb") as file:
                while part := file.read(2**20):
                    total.update(part)
            if total.hexdigest() != self.digest:
                raise FormatError(
                    f"{self.weights.path} was altered after it was saved: its checksum is not the one in {CONFIG}"
                )
        return self.weights.read()


def open_folder(folder: str | Path) -> Folder:
    """Open a folder written by `write_folder`, or by a tool that uses the same two files.

    Raises:
        FormatError: a file is missing, cut off, or a pickle in place of safetensors.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    weights = open_safetensors(folder / WEIGHTS)
    checksum, digest = config.pop(CHECKSUM, None), config.pop("weights_sha256", None)
    own = weights.metadata.get(CHECKSUM)
    if checksum is not None and own is not None and checksum != own:
        config = weights.config or config  # a save was cut off between the two files: the weights know their own config
    elif checksum is not None and own is None:
        raise FormatError(f"{folder / WEIGHTS} is not the file that {CONFIG} was saved with")
    if digest is not None and own is not None:
        config, digest = weights.config or config, None  # the same, over a folder of an earlier version
    return Folder(config, weights, digest)


def read_folder(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Config and tensors, of any shape by name, of a folder written by `write_folder`.

    Raises:
        FormatError: a file is missing, cut off, altered, or a pickle in place of safetensors.
    """
    opened = open_folder(folder)
    return opened.config, opened.read()


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict | None]:
    """Tensors of a safetensors file, of any shape by name, and the config embedded in it, if any."""
    opened = open_safetensors(path)
    return opened.read(), opened.config


def read_json(path: Path) -> dict:
    """A JSON object from a file, with errors that name the file."""
    if not path.is_file():
        raise FormatError(f"no {path.name} in {path.parent}; an SAE folder holds {CONFIG} and {WEIGHTS}")
    if path.stat().st_size > MOST_JSON:
        raise FormatError(f"{path} holds {path.stat().st_size} bytes, which no config of an SAE does")
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, where: str) -> dict:
    """A JSON object.

    Raises:
        FormatError: no JSON, or JSON of something else.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not readable JSON ({error}); the file is corrupt or cut off") from error
    if not isinstance(found, dict):
        raise FormatError(f"{where} holds a {type(found).__name__}, expected an object of settings")
    return found


def dtype_of(name: object) -> torch.dtype:
    """The torch dtype of a name such as ``"float32"`` or ``"torch.bfloat16"``."""
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise FormatError(f"dtype {name!r} is not a floating torch dtype such as 'float32' or 'bfloat16'")
    return found
