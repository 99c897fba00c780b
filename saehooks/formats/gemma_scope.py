"""Gemma Scope: ``params.npz`` with the five arrays of a JumpReLU SAE."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from saehooks.errors import FormatError
from saehooks.formats._linear import linear_sae, need
from saehooks.sae import SAE

WEIGHTS = "params.npz"
ARRAYS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")


def load(folder: str | Path, *, hook_name: str | None = None) -> SAE:
    """Load a Gemma Scope SAE: the same codes and reconstructions. Names may be in lower or upper case.

    Args:
        folder: holds params.npz, or that file itself.
        hook_name: its site, which the file does not say.
    Raises:
        FormatError: no such file, or arrays that do not fit. Pickled arrays are never opened.
    """
    path = Path(folder)
    path = path / WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise FormatError(f"no {WEIGHTS} at {folder}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name.lower(): torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError) as error:
        raise FormatError(f"{path} is not a readable file of arrays ({error})") from error
    W_enc, W_dec, b_enc, b_dec, threshold = need(found, ARRAYS, str(path))
    named = {
        "dictionary.W_enc": W_enc,
        "dictionary.W_dec": W_dec,
        "dictionary.b_enc": b_enc,
        "dictionary.b_dec": b_dec,
        "activation.log_theta": threshold.clamp(min=0).log(),
    }
    metadata = {"hook_name": hook_name, "source": {"format": "gemma_scope"}}
    return linear_sae(str(path), "jumprelu", named, metadata, apply_b_dec_to_input=False)
