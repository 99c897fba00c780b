"""The project's own folder: `cfg.json` and `sae_weights.safetensors`."""

from __future__ import annotations

from pathlib import Path

from saehooks.errors import FormatError
from saehooks.sae import FORMAT, SAE, SAEConfig
from saehooks.storage import read_folder


def load(folder: str | Path) -> SAE:
    """Load an SAE saved by `SAE.save`.

    Raises:
        FormatError: the folder is not one, is corrupt, or its tensors do not fit its config.
    """
    config, tensors = read_folder(folder)
    if config.get("format") != FORMAT:
        raise FormatError(f'{folder} was not saved by saehooks (its cfg.json has no "format": "{FORMAT}")')
    return SAE.from_config(SAEConfig.from_dict(config), tensors, str(folder))
