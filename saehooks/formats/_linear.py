"""Building a linear SAE from the tensors of another library's file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saehooks.errors import ConfigError, FormatError
from saehooks.sae import SAE


def linear_sae(
    where: str,
    activation: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    **settings: Any,
) -> SAE:
    """A linear SAE with the given parameters and buffers, in eval mode.

    Args:
        where: the file, for errors.
        activation: a key of `saehooks.activations.ACTIVATIONS`.
        tensors: by their name in our state dict; W_enc (d_in, d_sae) and W_dec (d_sae, d_in) must be among them. What
            is left out keeps its starting value, biases 0.
        metadata: what is known; None values are dropped.
        settings: of the SAE.
    Raises:
        FormatError: tensors that do not fit one another.
    """
    W_enc, W_dec = tensors["dictionary.W_enc"], tensors["dictionary.W_dec"]
    if W_enc.dim() != 2 or W_dec.shape != W_enc.T.shape:
        raise FormatError(f"{where}: encoder {tuple(W_enc.shape)} and decoder {tuple(W_dec.shape)} do not fit")
    d_in, d_sae = W_enc.shape
    dtype = W_enc.dtype if W_enc.is_floating_point() else torch.float32
    try:
        sae = SAE(d_in, d_sae, "linear", activation, dtype=dtype, **settings)
    except ConfigError as error:
        raise FormatError(f"{where}: {error}") from error
    state = sae.state_dict()
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise FormatError(f"{where}: {name} is {tuple(tensor.shape)}, expected {tuple(state[name].shape)}")
        state[name].copy_(tensor)
    sae.cfg.metadata = {name: value for name, value in metadata.items() if value is not None}
    sae.finished = True
    return sae.eval()


def need(found: Mapping[str, Any], names: tuple[str, ...], where: str) -> list[Any]:
    """The named entries.

    Raises:
        FormatError: one is missing.
    """
    missing = [name for name in names if name not in found]
    if missing:
        raise FormatError(f"{where}: no {', '.join(missing)}; found {', '.join(sorted(map(str, found))) or 'nothing'}")
    return [found[name] for name in names]
