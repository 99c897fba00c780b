"""Which reader a file or folder is for: decided by its contents, never guessed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saehooks.errors import FormatError
from saehooks.formats import (
    dictionary_learning,
    gemma_scope,
    native,
    openai,
    openmoss,
    saelens,
    sparsemax_sae,
    sparsify,
    state_dicts,
    vision,
)
from saehooks.formats.archives import open_torch_file
from saehooks.formats.pickles import attributes_of
from saehooks.sae import SparseCoder
from saehooks.storage import CONFIG, WEIGHTS, open_safetensors, read_json

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pkl.gz")
PRISMA = "weights.pt"


@dataclass(frozen=True)
class Wanted:
    """What the user and the table of releases say about a file or folder."""

    name: str
    """Where it came from: a repository and a folder in it, or the path."""
    hook_name: str | None = None
    ignore: tuple[str, ...] = ()
    input_scale: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Of a table of releases; they take the place of the config's."""

    @property
    def common(self) -> dict[str, Any]:
        """The arguments that every reader gets."""
        return {"hook_name": self.hook_name, "ignore": self.ignore}


def open_folder(folder: Path, wanted: Wanted) -> SparseCoder:
    """The SAE or transcoder of a folder.

    Raises:
        FormatError: nothing readable there, naming what was found and what was expected.
    """
    found = [name for name in FOLDERS if (folder / name).is_file()]
    if len(found) > 1:
        raise FormatError(f"{folder} holds {' and '.join(found)}, each of which could be an SAE: give the file")
    if found:
        return FOLDERS[found[0]](folder, wanted)
    if any((folder / name).is_file() for name in (openmoss.HYPERPARAMETERS, *openmoss.CHECKPOINTS)):
        return _openmoss(folder, wanted)
    if (folder / CONFIG).is_file():
        return _of_config(folder, wanted)
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name.endswith((*PICKLES, ".npz", ".safetensors")))
    if len(files) == 1:
        return open_file(files[0], wanted)
    raise FormatError(f"{folder} holds no SAE that is known: {_inside(folder, files)}")


def _inside(folder: Path, files: list[Path]) -> str:
    """What a folder without an SAE holds, and what to write."""
    if files:
        return f"it has {', '.join(p.name for p in files[:6])}; give one of these files"
    names = {*FOLDERS, CONFIG, openmoss.HYPERPARAMETERS}
    below = sorted(p.parent.relative_to(folder).as_posix() for n in names for p in folder.glob(f"*/{n}"))
    below += sorted(p.parent.relative_to(folder).as_posix() for n in names for p in folder.glob(f"*/*/{n}"))
    if below:
        listed = ", ".join(dict.fromkeys(below[:8])) + (", ..." if len(below) > 8 else "")
        return f"its SAEs lie in {listed}; give one, as in sh.load(folder, {below[0]!r})"
    return f"an SAE of ours is {CONFIG} and {WEIGHTS}"


def _of_config(folder: Path, wanted: Wanted) -> SparseCoder:
    """A folder of cfg.json: ours, or SAELens'."""
    if "format" in read_json(folder / CONFIG):
        _no_scale(wanted, "a folder of saehooks")
        return native.load(folder)
    return saelens.load(folder, **wanted.common, input_scale=wanted.input_scale, settings=wanted.settings)


def _weights(folder: Path, wanted: Wanted) -> SparseCoder:
    """A folder of sae_weights.safetensors, which three libraries write with different configs."""
    if not (folder / CONFIG).is_file() and (folder / openmoss.CONFIG).is_file():
        return _openmoss(folder, wanted)
    if (folder / openmoss.HYPERPARAMETERS).is_file():
        return _openmoss(folder, wanted)
    return _of_config(folder, wanted)


def _openmoss(folder: Path, wanted: Wanted) -> SparseCoder:
    return openmoss.load(folder, **wanted.common, input_scale=wanted.input_scale)


def _gemma_scope(path: Path, wanted: Wanted) -> SparseCoder:
    _no_scale(wanted, "Gemma Scope")
    return gemma_scope.load(path, **wanted.common, name=wanted.name)


def _dictionary_learning(folder: Path, wanted: Wanted) -> SparseCoder:
    _no_scale(wanted, "dictionary_learning")
    return dictionary_learning.load(folder, **wanted.common, name=wanted.name)


def _sparsify(folder: Path, wanted: Wanted) -> SparseCoder:
    _no_scale(wanted, "sparsify")
    return sparsify.load(folder, **wanted.common)


def _prisma(folder: Path, wanted: Wanted) -> SparseCoder:
    return open_file(folder / PRISMA, wanted)


FOLDERS: dict[str, Callable[[Path, Wanted], SparseCoder]] = {
    gemma_scope.WEIGHTS: _gemma_scope,
    gemma_scope.WEIGHTS_2: _gemma_scope,
    dictionary_learning.WEIGHTS: _dictionary_learning,
    sparsify.WEIGHTS: _sparsify,
    WEIGHTS: _weights,
    PRISMA: _prisma,
}
"""Names of weight files, which decide the format of a folder."""


def open_file(path: Path, wanted: Wanted) -> SparseCoder:
    """The SAE or transcoder of a file.

    Raises:
        FormatError: it is none that is known, naming what was found and what was expected.
    """
    if path.name.endswith(".npz"):
        return _gemma_scope(path, wanted)
    if path.name.endswith(".safetensors"):
        if path.name in FOLDERS:
            return FOLDERS[path.name](path.parent, wanted)
        return _safetensors(path, wanted)
    if path.name.endswith(PICKLES):
        _no_scale(wanted, path.name)
        return _pickle(path, wanted)
    raise FormatError(
        f"{str(path)!r} is a file; give the folder that holds it, or a file that ends in {', '.join(PICKLES)}, .npz or "
        ".safetensors"
    )


def _safetensors(path: Path, wanted: Wanted) -> SparseCoder:
    """A file of tensors without a config: a layer's transcoder of circuit-tracer, by its name."""
    tensors = open_safetensors(path).tensors
    if re.fullmatch(r"layer_\d+\.safetensors", path.name) and {"W_enc", "W_dec", "b_enc", "b_dec"} <= set(tensors):
        _no_scale(wanted, path.name)
        name = wanted.name if wanted.name.endswith(path.name) else str(path)
        model = wanted.settings.get("model_name")
        return state_dicts.read_circuit_tracer(tensors, str(path), **wanted.common, name=name, model_name=model)
    raise FormatError(f"{path} holds {', '.join(sorted(tensors)[:8])}, and nothing says how an SAE is made of them")


def _pickle(path: Path, wanted: Wanted) -> SparseCoder:
    """A file of torch or a plain pickle; its contents decide the format."""
    with path.open("rb") as file:
        if vision.is_saev(file.read(64)):
            return vision.read_saev(path, **wanted.common)
    found, where = open_torch_file(path), str(path)
    if sparsemax_sae.is_one(found):
        return sparsemax_sae.read(found, path, **wanted.common)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        cfg = found.get("cfg", found.get("config"))
        return vision.read_pair(attributes_of(cfg), found["state_dict"], where, **wanted.common)
    if isinstance(found, dict) and isinstance(found.get("autoencoder"), dict):
        state = found["autoencoder"].get("state_dict")
        return vision.read_pair(attributes_of(found.get("config")), state, where, **wanted.common)
    if openai.is_one(found):
        return openai.read(found, where, **wanted.common, name=wanted.name)
    if state_dicts.is_linear_layers(found):
        return state_dicts.read_linear_layers(found, where, **wanted.common, name=wanted.name)
    if re.fullmatch(r"layer\d+\.sae\.pt", path.name):
        return state_dicts.read_qwen_scope(found, where, **wanted.common, name=wanted.name)
    beside = path.with_name(path.name.removesuffix(".pt") + "_cfg.json")
    if beside.is_file():
        return state_dicts.read_hook_z(found, read_json(beside), where, **wanted.common)
    config = path.parent / "config.json"
    if path.name == PRISMA and config.is_file():
        return vision.read_pair(read_json(config), found, where, **wanted.common)
    if isinstance(found, dict) and ("encoder.weight" in found or "W_enc" in found):
        return dictionary_learning.load(path, **wanted.common, name=wanted.name)
    held = ", ".join(sorted(map(str, found))[:8]) if isinstance(found, dict) else f"a {type(found).__name__}"
    raise FormatError(f"{path} holds {held}: no state dict of an SAE that is known")


def _no_scale(wanted: Wanted, what: str) -> None:
    if wanted.input_scale is not None:
        raise FormatError(f"input_scale={wanted.input_scale} is for SAEs whose activations were scaled; not for {what}")
