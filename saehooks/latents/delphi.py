"""Write activations as delphi's ``LatentCache`` does, for it to explain and score latents.

Source: EleutherAI/delphi, ``delphi/latents/cache.py`` (``save_splits``, ``save_config``) and ``loader.py``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as to_bytes
from torch import Tensor

from saehooks.attachments import read
from saehooks.attachments.resolve import find
from saehooks.errors import ConfigError
from saehooks.hosts import host as host_of
from saehooks.sae import SAE
from saehooks.show.progress import bar
from saehooks.storage import write_file
from saehooks.streams import checked_batches

ENTRY = np.dtype([("sequence", "<u4"), ("column", "<u4"), ("latent", "<u4"), ("value", "<f2")])


def write_delphi(
    model: Any,
    sae: SAE,
    batches: Iterable[Tensor],
    folder: str | Path,
    *,
    n_splits: int = 5,
    at: str | None = None,
    head: int | None = None,
    where: Any = None,
    model_name: str = "",
    dataset: str = "",
    progress: bool | None = None,
) -> Path:
    """Write every activation of an SAE over some texts as a cache of delphi's.

    Args:
        model, sae, at, head, where, progress: as in `saehooks.survey`.
        batches: token tensors (batch, pos), all of one length.
        folder: gets a folder named after the site, with a safetensors file for each part of the latents and
            ``config.json``. In memory is one part at a time.
        n_splits: parts.
        model_name: a hub name, from which delphi loads the tokenizer; by default the model's own name.
        dataset: a hub name, written into the config.
    Returns:
        The folder named after the site: give delphi its parent.
    Raises:
        ConfigError: no tokens, sequences of several lengths, or values too large for half precision.
    """
    host = host_of(model)
    site = find(host, sae, at, head)
    if not 1 <= n_splits <= sae.d_sae:
        raise ConfigError(f"n_splits must lie in 1 .. {sae.d_sae}, got {n_splits}")
    bounds = np.linspace(0, sae.d_sae, n_splits + 1).astype(int)
    options = {"at": site.name, "head": site.head, **({} if where is None else {"where": where})}
    target = Path(folder) / site.name
    target.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target, prefix=".parts-"))
    tokens: list[np.ndarray] = []
    try:
        with bar(progress) as shown:
            shown.start("caching", len(batches) if hasattr(batches, "__len__") else None)  # type: ignore[arg-type]
            for batch in checked_batches(batches):
                first = sum(map(len, tokens))
                with torch.no_grad(), read(model, sae, **options) as trace, host.stop_at(site):
                    host.run(host.to_device(batch))
                tokens.append(_tokens(trace, tokens))
                _append(trace, first, bounds, scratch)
                shown.step()
        if not tokens:
            raise ConfigError("there is nothing to write: the batches are empty")
        together = np.concatenate(tokens)
        for i in range(n_splits):
            _write_split(scratch / str(i), target, int(bounds[i]), int(bounds[i + 1]) - 1, together)
    finally:
        shutil.rmtree(scratch)
    name = model_name or str(host.describe().get("model_name") or "")
    config = {
        "dataset_repo": dataset,
        "dataset_split": "train",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": len(tokens[0]),
        "cache_ctx_len": together.shape[1],
        "ctx_len": together.shape[1],
        "n_tokens": int(together.size),
        "n_splits": n_splits,
        "model_name": name,
    }
    write_file(target / "config.json", json.dumps(config, indent=1).encode())
    return target


def _tokens(trace: Any, before: list[np.ndarray]) -> np.ndarray:
    if trace.tokens is None:
        raise ConfigError("delphi explains latents of texts, and these batches hold no tokens")
    found = trace.tokens.cpu().numpy().astype(np.int64)
    if before and before[0].shape[1] != found.shape[1]:
        lengths = f"{before[0].shape[1]} and {found.shape[1]}"
        raise ConfigError(f"delphi's cache needs sequences of one length, got {lengths}; use sh.TokenBatches")
    return found


def _append(trace: Any, first: int, bounds: np.ndarray, scratch: Path) -> None:
    """Add the entries of a batch to the files of their parts."""
    codes = trace.codes
    pos = codes.shape[1]
    kept = codes.values != 0
    if trace.mask is not None:
        kept &= trace.mask.reshape(-1).to(kept.device)[codes.rows]
    rows, latents = codes.rows[kept].cpu().numpy(), codes.indices[kept].cpu().numpy()
    values = codes.values[kept].float().cpu().numpy()
    if len(values) and np.abs(values).max() > np.finfo(np.float16).max:
        raise ConfigError(f"a value of {np.abs(values).max():.3g} does not fit the half precision of delphi's cache")
    entries = np.empty(len(rows), ENTRY)
    entries["sequence"], entries["column"] = rows // pos + first, rows % pos
    entries["latent"], entries["value"] = latents, values
    part = np.searchsorted(bounds, latents, side="right") - 1
    for i in range(len(bounds) - 1):
        with (scratch / str(i)).open("ab") as file:
            file.write(entries[part == i].tobytes())


def _write_split(file: Path, target: Path, first: int, last: int, tokens: np.ndarray) -> None:
    """One part of the latents, counted from the first of them, in the smallest integers that hold them."""
    entries = np.frombuffer(file.read_bytes(), ENTRY)
    places = np.stack([entries["sequence"], entries["column"], entries["latent"] - np.uint32(first)], axis=1)
    small = not len(places) or int(places.max()) < 2**16
    tensors = {
        "locations": np.ascontiguousarray(places.astype(np.uint16 if small else np.uint32)),
        "activations": np.ascontiguousarray(entries["value"]),
        "tokens": tokens,
    }
    write_file(target / f"{first}_{last}.safetensors", to_bytes(tensors))
