"""The project's own folder: `cfg.json` and `sae_weights.safetensors`."""

from __future__ import annotations

from pathlib import Path

from saehooks.errors import FormatError
from saehooks.sae import FORMAT, SAEConfig, SparseCoder, without_memory
from saehooks.storage import open_folder


def load(folder: str | Path) -> SparseCoder:
    """Load an SAE or a transcoder saved by `SAE.save`.

    Raises:
        FormatError: the folder is not one, is corrupt, or its tensors do not fit its config.
    """
    opened, where = open_folder(folder), str(folder)
    if opened.config.get("format") != FORMAT:
        raise FormatError(f'{folder} was not saved by saehooks (its cfg.json has no "format": "{FORMAT}")')
    sae = without_memory(SAEConfig.from_dict(opened.config), where)
    sae.check_shapes(opened.shapes, where)  # before any memory is taken
    sae.adopt(opened.read(), where)
    return sae
