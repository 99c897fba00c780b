"""Files of torch and numpy, opened without running anything in them: shapes first, bytes when they are wanted.

A file of `torch.save` is a zip archive of one pickle and the bytes of every storage, or, before torch 1.6, a row of
pickles followed by the bytes. Neither is given to `torch.load`, which would run an archive of TorchScript.
"""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from saehooks.errors import FormatError
from saehooks.formats.pickles import Calls, Reference, read_pickle
from saehooks.storage import StoredTensor

MOST_EXPANSION = 16
"""A compressed file that unpacks to more than so many times its size is refused."""
ALWAYS = 16 * 2**20
"""Bytes that a compressed file may unpack to in any case."""
MAGIC = 0x1950A86A20F9469CFC6C
"""The first number of a file of torch before 1.6."""
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


@dataclass
class Storage:
    """Bytes of a file that tensors look at."""

    dtype: torch.dtype
    numel: int
    read: Callable[[], Tensor] | None = None
    """(bytes,) uint8; None until it is known where they lie."""


# ----------------------------------------------------------------------- torch


def open_torch_file(path: str | Path, start: int = 0) -> Any:
    """What a ``.pt``, ``.pth``, ``.pkl`` or ``.pkl.gz`` file holds: plain values, and tensors that are not read yet.

    Args:
        path: the file.
        start: where its content begins, behind bytes of another kind.
    Raises:
        FormatError: no such file, or not readable.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"no file {path}")
    try:
        if path.suffix == ".gz":
            return _open_pickles(io.BytesIO(_gunzip(path)))
        with path.open("rb") as file:
            file.seek(start)
            if file.read(4) == b"PK\x03\x04":
                return _open_zip(path)
            file.seek(start)
            return _open_pickles(file, path)
    except FormatError as error:
        raise FormatError(f"{path} is not a readable file of tensors: {error}") from error
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise FormatError(f"{path} is not a readable file of tensors ({type(error).__name__}: {error})") from error


def _open_zip(path: Path) -> Any:
    entries = _entries(path)
    roots = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise FormatError("it is a zip archive, but not one of torch.save")
    if roots[0] + "byteorder" in entries and _bytes_of(path, entries[roots[0] + "byteorder"]) != b"little":
        raise FormatError("its numbers are in the byte order of another machine")

    def storage(found: Any) -> Storage:
        kind, key, numel = _storage_id(found)
        entry = entries.get(f"{roots[0]}data/{key}")
        if entry is None or entry.file_size != numel * kind.itemsize:
            raise FormatError(f"its storage {key} does not hold the {numel} numbers that it should")
        return Storage(kind, numel, lambda: _read_entry(path, entry))

    return read_pickle(io.BytesIO(_bytes_of(path, entries[roots[0] + "data.pkl"])), _calls(), storage)


def _storage_id(found: Any) -> tuple[torch.dtype, str, int]:
    """Type, key and numbers of a storage, as its persistent id says."""
    whole = isinstance(found, tuple) and found[:1] == ("storage",) and (len(found) == 5 or found[5:] == (None,))
    kind, key, numel = (found[1], found[2], found[4]) if whole else (None, None, None)
    dtype = (
        STORAGES.get(kind.name) if isinstance(kind, Reference) and kind.module in ("torch", "torch.storage") else None
    )
    if dtype is None or not isinstance(key, str) or type(numel) is not int or numel < 0:
        raise FormatError("it refers to a storage in a way that is not understood")
    return dtype, key, numel


def _open_pickles(file: BinaryIO, path: Path | None = None) -> Any:
    """A plain pickle, or the row of pickles and the bytes behind them that torch wrote before 1.6."""
    storages: dict[str, Storage] = {}

    def storage(found: Any) -> Storage:
        dtype, key, numel = _storage_id(found)
        made = storages.setdefault(key, Storage(dtype, numel))
        if made.dtype != dtype or made.numel != numel:
            raise FormatError(f"it refers to its storage {key} in two ways")
        return made

    first = read_pickle(file, _calls(), storage)
    if type(first) is not int or first != MAGIC:
        return first
    for _ in range(2):  # the protocol, and sizes of the machine that wrote it
        read_pickle(file, _calls(), storage)
    found, keys = read_pickle(file, _calls(), storage), read_pickle(file, _calls(), storage)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise FormatError("it does not say where its tensors lie")
    start, size = file.tell(), file.seek(0, io.SEEK_END)
    for key in keys:
        made = storages[key]
        file.seek(start)
        count, length = int.from_bytes(file.read(8), "little"), made.numel * made.dtype.itemsize
        if count != made.numel or start + 8 + length > size:
            raise FormatError(f"its storage {key} does not hold the {made.numel} numbers that it should")
        made.read = _reads(file, path, start + 8, length)
        start += 8 + length
    return found


def _reads(file: BinaryIO, path: Path | None, start: int, length: int) -> Callable[[], Tensor]:
    def read() -> Tensor:
        if path is not None:
            return _read_bytes(path, start, length)
        file.seek(start)
        return torch.frombuffer(bytearray(file.read(length)), dtype=torch.uint8) if length else _no_bytes()

    return read


def _calls() -> Calls:
    """The functions that files of tensors call, and what is done for them."""
    return {
        ("collections", "OrderedDict"): _ordered_dict,
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
        ("torch.storage", "_load_from_bytes"): _storage_of_bytes,
        ("torch", "Size"): lambda sizes: tuple(sizes),
        ("torch", "device"): lambda *parts: ":".join(str(part) for part in parts if isinstance(part, (str, int))),
    }


def _ordered_dict(*pairs: Any) -> dict[str, Any]:
    """The dict of a call with (name, value) pairs, or with nothing."""
    made = dict(*pairs) if all(isinstance(name, str) for one in pairs for name, _ in one) else None
    if made is None:
        raise FormatError("a dict inside it has keys that are no names")
    return made


def _storage_of_bytes(data: Any) -> Storage:
    """A storage that lies inside a pickle as a file of torch of its own."""
    # A storage as torch writes it contains no other.
    whole = isinstance(data, bytes) and data[:2] != b"PK" and b"_load_from_bytes" not in data
    found = _open_pickles(io.BytesIO(data)) if whole else None
    if not isinstance(found, Storage):
        raise FormatError("a tensor inside it is stored in a way that is not understood")
    return found


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    """A tensor that looks at a storage, all of which must lie inside it and no number of which is shown twice."""
    sizes = (*shape, *stride, offset) if isinstance(shape, tuple) and isinstance(stride, tuple) else (None,)
    if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in sizes):
        raise FormatError("a tensor inside it is described in a way that is not understood")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if prod(shape) else 0
    if prod(shape) > storage.numel or (prod(shape) and last >= storage.numel):
        raise FormatError(f"a tensor of shape {shape} lies outside the {storage.numel} numbers that it should look at")

    def read() -> Tensor:
        if storage.read is None:
            raise FormatError("a tensor of the file has no numbers")
        whole = storage.read().view(storage.dtype)
        return whole.as_strided(shape, stride, offset)

    return StoredTensor(shape, storage.dtype, read)


def _gunzip(path: Path) -> bytes:
    most = max(ALWAYS, MOST_EXPANSION * path.stat().st_size)
    with gzip.open(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise FormatError(f"it unpacks to more than {MOST_EXPANSION} times its size, which no weights do")
    return data


# ----------------------------------------------------------------------- numpy


def open_npz(path: str | Path) -> dict[str, StoredTensor]:
    """Arrays of a ``.npz`` file, not read yet.

    Raises:
        FormatError: no such file, not readable, or an array of Python objects among them: such arrays are pickles.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"no file {path}")
    try:
        entries = {n.removesuffix(".npy"): entry for n, entry in _entries(path, packed=True).items()}
        return {name: _array(path, name, entry) for name, entry in entries.items()}
    except FormatError as error:
        raise FormatError(f"{path} is not a readable file of arrays: {error}") from error
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise FormatError(f"{path} is not a readable file of arrays ({type(error).__name__}: {error})") from error


def _array(path: Path, name: str, entry: zipfile.ZipInfo) -> StoredTensor:
    with zipfile.ZipFile(path) as archive, archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise FormatError(f"{name} is an array of version {version}")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
        start = file.tell()
    if dtype.hasobject or dtype.kind not in "fiub":
        raise FormatError(f"{name} is an array of {dtype}, not of numbers; arrays of objects are never opened")
    if entry.file_size - start != prod(shape) * dtype.itemsize:
        raise FormatError(f"{name} does not hold the {shape} numbers that its header says")

    def read() -> Tensor:
        data = _read_entry(path, entry)[start:].numpy()
        array = data.view(dtype).reshape(shape[::-1] if fortran else shape)
        return torch.from_numpy((array.T if fortran else array).astype(dtype.newbyteorder("="), copy=False))

    kind = torch.from_numpy(np.zeros(0, dtype.newbyteorder("="))).dtype
    return StoredTensor(tuple(shape), kind, read)


# ------------------------------------------------------------------------- zip


def _entries(path: Path, packed: bool = False) -> dict[str, zipfile.ZipInfo]:
    """The entries of a zip archive by name, of sizes that the file can hold.

    Args:
        path: the archive.
        packed: whether entries may be compressed, as `numpy.savez_compressed` does.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    inside = {name.split("/", 1)[-1] for name in entries}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise FormatError("it is a TorchScript archive, which is a program; none is opened")
    total = 0
    for name, entry in entries.items():
        stored = entry.compress_type == zipfile.ZIP_STORED
        if entry.flag_bits & 1 or not (stored or (packed and entry.compress_type == zipfile.ZIP_DEFLATED)):
            raise FormatError(f"its entry {name} is packed in a way that such a file never is")
        if entry.compress_size > size or (stored and entry.file_size != entry.compress_size):
            raise FormatError(f"its entry {name} claims {entry.file_size} bytes, the file holds {size}")
        total += entry.file_size
    if total > max(ALWAYS, MOST_EXPANSION * size):
        raise FormatError(f"it unpacks to {total} bytes, over {MOST_EXPANSION} times its size, which no weights do")
    return entries


def _bytes_of(path: Path, entry: zipfile.ZipInfo) -> bytes:
    return _read_entry(path, entry).numpy().tobytes()


def _read_entry(path: Path, entry: zipfile.ZipInfo) -> Tensor:
    """(bytes,) uint8, the content of an entry."""
    if entry.compress_type != zipfile.ZIP_STORED:
        with zipfile.ZipFile(path) as archive, archive.open(entry) as file:
            return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        head = file.read(30)
    if head[:4] != b"PK\x03\x04":
        raise FormatError(f"its entry {entry.filename} does not begin where it should")
    # Its name and more stand between the head and the content, at lengths that the head gives.
    start = entry.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    data = _read_bytes(path, start, entry.file_size)
    if entry.CRC and zlib.crc32(data.numpy().data) != entry.CRC:
        raise FormatError(f"its entry {entry.filename} is corrupt: its checksum is another")
    return data


def _read_bytes(path: Path, start: int, length: int) -> Tensor:
    if start + length > path.stat().st_size:
        raise FormatError(f"{path} ends before the tensor that should lie at {start}")
    data = torch.empty(length, dtype=torch.uint8)
    rest = data.numpy().data
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while len(rest):
            got = file.readinto(rest)  # type: ignore[attr-defined]
            if not got:
                raise FormatError(f"{path} became shorter while it was read")
            rest = rest[got:]
    return data


def _no_bytes() -> Tensor:
    return torch.zeros(0, dtype=torch.uint8)
