"""Reading SAEs from disk or a hub: the native folder here, one file for each third-party format."""

from __future__ import annotations

from pathlib import Path

import torch

from saehooks.errors import FormatError
from saehooks.formats import dictionary_learning, gemma_scope, native, saelens, sparsemax_sae, sparsify
from saehooks.sae import SAE
from saehooks.storage import CONFIG, read_json


def load(source: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SAE:
    """Load an SAE from a folder, or from a Hugging Face hub id such as ``"user/name"`` or ``"user/name/subfolder"``.

    Beside our own folders those of SAELens, sparsify, dictionary_learning and Gemma Scope are told apart by what they
    hold, and files by their ending: ``.pt``, ``.pkl``, ``.pkl.gz`` are checkpoints of the Sparsemax SAE's authors.

    Args:
        source: the folder or file, or the hub id when no such folder exists.
        device: where to put it; the CPU if not given.
        dtype: what it should compute in; what it was trained in if not given.
    Raises:
        FormatError: nothing readable there, naming what was found and what was expected.
    """
    path = Path(source)
    if path.is_file() and path.name.endswith((".pt", ".pkl", ".pkl.gz")):
        return sparsemax_sae.load(path).to(device=device, dtype=dtype)
    if path.is_file():
        raise FormatError(
            f"{str(source)!r} is a file; give the folder that holds it, or a file that ends in .pt or .pkl"
        )
    if not path.is_dir():
        path = _download(str(source))
    return _load_folder(path).to(device=device, dtype=dtype)


def _load_folder(folder: Path) -> SAE:
    for module in (gemma_scope, dictionary_learning, sparsify):
        if (folder / module.WEIGHTS).is_file():
            return module.load(folder)
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
        if "format" not in config and "architecture" in config:
            return saelens.load(folder)
    return native.load(folder)


def _download(hub_id: str) -> Path:
    parts = hub_id.split("/")
    if len(parts) < 2 or hub_id.startswith((".", "/")) or not all(parts):
        raise FormatError(f"no folder {hub_id!r}; give a folder that holds cfg.json, or a hub id such as 'user/name'")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FormatError(f"no folder {hub_id!r}, and huggingface_hub is not installed to look on the hub") from error
    pattern = "/".join([*parts[2:], "*"])
    try:
        root = snapshot_download("/".join(parts[:2]), allow_patterns=[pattern])
    except Exception as error:
        raise FormatError(f"no folder {hub_id!r}, and the hub did not give it: {error}") from error
    return Path(root, *parts[2:])
