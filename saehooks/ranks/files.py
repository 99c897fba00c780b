"""One safetensors file that all ranks write, each its own rows of each tensor, and of which each reads its own.

The file is the one that a single process would write: it can be read by any number of ranks, and by one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saehooks.ranks.grid import Alone
from saehooks.storage import (
    CHECKSUM,
    TRANSPOSED,
    SafetensorsFile,
    as_in_memory,
    block_sums,
    bytes_of,
    checksum_of,
    header_bytes,
    header_of,
    locked_file,
    open_safetensors,
    remove_abandoned,
    write_safetensors,
)


def write_together(
    path: Path,
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, int],
    metadata: Mapping[str, str],
    ranks: Alone,
    *,
    signed: bool,
) -> str:
    """Write a file of tensors, of which each rank has its own latents; it replaces the old one when it is whole.

    Args:
        path: on a disk that all ranks see.
        tensors: own part of each; those that all ranks have are written by the first.
        axes: along which latents lie, by name, for those that have own parts.
        metadata: text of the header.
        ranks: all of them call this.
        signed: put a checksum into the header; the first rank reads the file once more for it.
    Returns:
        The checksum, "" without one.
    Raises:
        OSError: on every rank, where one of them could not write; the old file stays.
    """
    if ranks.size == 1:
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = dict(as_in_memory(name, tensor) for name, tensor in tensors.items())
        return write_safetensors(path, stored, metadata)
    own = {name: _stored(name, tensor, axes, ranks) for name, tensor in tensors.items()}
    layout = {name: (piece.dtype, shape) for name, piece, shape, _ in own.values()}
    header = header_of(layout, metadata)
    if not signed:
        del header["__metadata__"][CHECKSUM]
    with ExitStack() as held:  # the first rank's lock on the file, for as long as the ranks write
        made = ranks.agree(lambda: _begin(path, header, held) if ranks.leads else "")
        # The first rank's header counts: what others say of the training, such as seconds, may be longer or shorter.
        name, start = ranks.tell((made, len(header_bytes(header))))[0]
        try:
            ranks.agree(lambda: _fill(name, start, header, own, ranks))
            return ranks.tell(ranks.agree(lambda: _finish(name, path, header, signed) if ranks.leads else ""))[0]
        except BaseException:
            if ranks.leads:
                Path(name).unlink(missing_ok=True)
            raise


def _stored(
    name: str, tensor: Tensor, axes: Mapping[str, int], ranks: Alone
) -> tuple[str, Tensor, tuple[int, ...], bool]:
    """Name in the file, own rows, shape of the whole, and whether the rows are a part of it."""
    axis = axes.get(name) if ranks.latents > 1 else None
    if axis is None:
        stored, piece = as_in_memory(name, tensor.detach())
        return stored, piece, tuple(piece.shape), False
    stored, piece = (name, tensor.detach()) if axis == 0 else (name + TRANSPOSED, tensor.detach().T)
    return stored, piece, (piece.shape[0] * ranks.latents, *piece.shape[1:]), True


def _begin(path: Path, header: dict, held: ExitStack) -> str:
    """A file beside the one to be replaced, of its full size, open and locked until ``held`` ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    handle, name = locked_file(path)
    try:
        file = held.enter_context(os.fdopen(handle, "wb"))
        head = header_bytes(header)
        file.write(head)
        file.truncate(len(head) + max(entry["data_offsets"][1] for entry in list(header.values())[1:]))
        file.flush()
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return name


def _fill(
    name: str, start: int, header: dict, own: Mapping[str, tuple[str, Tensor, tuple[int, ...], bool]], ranks: Alone
) -> None:
    """Write own rows behind a header that ends at ``start``; of ranks that share latents, one does."""
    with open(name, "r+b") as file:
        for stored, piece, _, is_part in own.values():
            if not (ranks.leads or (is_part and ranks.data_rank == 0)):
                continue
            data = bytes_of(piece.cpu().contiguous())
            before = len(data) * ranks.latent_rank if is_part else 0
            file.seek(start + header[stored]["data_offsets"][0] + before)
            file.write(data.numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _finish(name: str, path: Path, header: dict, signed: bool) -> str:
    checksum = ""
    if signed:
        sums = {
            key: block_sums(bytes_of(stored.read())) for key, stored in open_safetensors(Path(name)).tensors.items()
        }
        header["__metadata__"][CHECKSUM] = checksum = checksum_of(sums)
        with open(name, "r+b") as file:
            file.write(header_bytes(header))
            file.flush()
            os.fsync(file.fileno())
    os.chmod(name, 0o644)
    os.replace(name, path)
    return checksum


def read_part(opened: SafetensorsFile, axis_of: Callable[[str], int | None], ranks: Alone) -> dict[str, Tensor]:
    """Own rows of the tensors of a file.

    Args:
        opened: a file that any number of ranks wrote.
        axis_of: along which latents lie in the tensor of a name, None where all ranks have all of it.
        ranks: which part is wanted.
    Raises:
        FormatError: it was cut short meanwhile; where all of it is read, also if it was altered.
    """
    if ranks.latents == 1:
        return opened.read()
    tensors: dict[str, Any] = {}
    for stored, found in opened.tensors.items():
        name, turned = stored.removesuffix(TRANSPOSED), stored.endswith(TRANSPOSED)
        axis = axis_of(name)
        if axis is None:
            tensor = found.read()
            tensors[name] = tensor.T if turned else tensor
        elif axis == int(turned):  # latents are the rows of what is stored
            n = found.shape[0] // ranks.latents
            tensor = found.read(n * ranks.latent_rank, n * (ranks.latent_rank + 1))
            tensors[name] = tensor.T if turned else tensor
        else:
            tensor = found.read()
            n = tensor.shape[1] // ranks.latents
            tensor = tensor[:, n * ranks.latent_rank : n * (ranks.latent_rank + 1)]
            tensors[name] = (tensor.T if turned else tensor).clone(memory_format=torch.contiguous_format)
    return tensors
