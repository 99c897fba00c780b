"""Reading SAEs from disk, by repository or by release: our own folders, and those of other libraries.

Nothing of a file is executed, nothing outside the folder is read, and nothing is read before its size is known. What a
reader does not understand is an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from saehooks import hub
from saehooks.errors import ConfigError, FormatError
from saehooks.formats import releases
from saehooks.formats.opening import Wanted, open_file, open_folder
from saehooks.sae import SparseCoder


def load(
    source: str | Path,
    sae_id: str | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    hook_name: str | None = None,
    ignore: Iterable[str] = (),
    input_scale: float | None = None,
    table: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SparseCoder:
    """Load an SAE or a transcoder, of this library or another, from disk, from a hub, or by a release's name.

    Read are folders of saehooks, SAELens (of all versions), sparsify, dictionary_learning, Gemma Scope 1 and 2 and
    OpenMOSS (Llama Scope), and files of OpenAI, PatchSAE, Prisma, saev, Goodfire, DeepSeek-R1, Qwen Scope,
    circuit-tracer and of the authors of the Sparsemax SAE. The contents decide which one it is.

    Args:
        source: a folder or a file; a hub id such as ``"user/name"`` or ``"user/name/subfolder"`` when no such folder
            exists; or a release in SAELens' table, such as ``"gpt2-small-res-jb"``.
        sae_id: which SAE of the release or the folder, such as ``"blocks.8.hook_resid_pre"``.
        subfolder: the same, for a repository.
        revision: of the repository: a branch, a tag or a commit.
        hook_name: its site, where the file does not say it, or in place of the one it says.
        ignore: settings or tensors of the file that you know to change nothing; without it they are refused by name.
        input_scale: the factor that scaled the activations in training, where a file says that there was one and does
            not hold it.
        table: a copy of SAELens' ``pretrained_saes.yaml``; that of an installed SAELens if not given.
        device: where to put it; the CPU if not given.
        dtype: what it should compute in; what it was trained in if not given.
    Raises:
        FormatError: nothing readable there, naming what was found and what was expected.
    """
    ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    known: dict[str, Any] = {"ignore": ignored, "input_scale": input_scale}
    if not isinstance(source, (str, Path)):
        raise FormatError(f"load takes a folder, a hub id or a release, got {type(source).__name__}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype={dtype!r}; expected a torch.dtype, such as torch.float16")
    path = Path(source)
    if sae_id is not None and subfolder is not None:
        raise FormatError(f"give sae_id={sae_id!r} or subfolder={subfolder!r}, not both")
    below = sae_id if sae_id is not None else subfolder
    if path.exists():
        if below is not None:
            path = hub.inside(path, below)
        name = str(path.resolve())
        sae = _open(path, Wanted(name, hook_name=hook_name, **known))
    elif (release := releases.find(str(source), sae_id, table)) is not None:
        path = hub.fetch(release.repository, release.path, revision)
        scale = release.input_scale if input_scale is None else input_scale
        known["input_scale"] = scale
        name = f"{release.repository}/{release.path}"
        sae = releases.read(release, path, Wanted(name, hook_name=hook_name, settings=release.settings, **known))
    else:
        repository, folder = hub.split(str(source), below)
        path = hub.fetch(repository, folder, revision)
        sae = _open(path, Wanted("/".join([repository, folder]).rstrip("/"), hook_name=hook_name, **known))
    if hook_name is not None:
        sae.cfg.metadata["hook_name"] = hook_name
    return sae.to(device=device, dtype=dtype)


def _open(path: Path, wanted: Wanted) -> SparseCoder:
    if path.is_file():
        return open_file(path, wanted)
    if not path.is_dir():
        raise FormatError(f"no file or folder {str(path)!r}")
    return open_folder(path, wanted)
