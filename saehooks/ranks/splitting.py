"""Splitting an SAE: this rank's latents as an SAE of its own, and the whole from the parts of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saehooks.errors import ConfigError
from saehooks.ranks.activations import SHARDED, ShardedDensity
from saehooks.ranks.dictionary import ShardedDictionary
from saehooks.ranks.grid import Alone, Ranks
from saehooks.sae import SAE, SAEConfig


def axes_of(sae: SAE) -> dict[str, int]:
    """The axis along which latents lie, for each tensor of an SAE that has one; also for the counts a trainer keeps."""
    parts = {"dictionary": sae.dictionary, "activation": sae.activation, "density": sae.density}
    found = {f"{prefix}.{name}": axis for prefix, module in parts.items() for name, axis in module.by_latent.items()}
    return {**found, "idle": 0}


def check_splits(cfg: SAEConfig, ranks: Alone) -> None:
    """Raise before anything runs where latents cannot be split evenly.

    Raises:
        ConfigError: says by how many they can be.
    """
    units, of = cfg.d_sae, "latents"
    if cfg.dictionary == "kron":
        units, of = cfg.d_sae // (cfg.settings.get("m", 4) * cfg.settings.get("n", 4)), "heads"
    if units % ranks.latents:
        raise ConfigError(
            f"{units} {of} cannot be split evenly over latent_ranks={ranks.latents}: make d_sae a multiple of "
            f"{cfg.d_sae // units * ranks.latents}, or give another latent_ranks="
        )


def shard(sae: SAE, ranks: Alone) -> SAE:
    """This rank's latents, as an SAE whose selection, sums and counts are joined with those of the other ranks.

    Where latents are not split it shares the tensors of the SAE; where they are, it has copies of its own part.

    Raises:
        ConfigError: a number of latents that cannot be split evenly, or no SAE.
    """
    if not isinstance(ranks, Ranks):
        return sae
    if not isinstance(sae, SAE):
        kind = type(sae).__name__
        raise ConfigError(f"processes share the whole SAE, as sh.SAE(...) or sh.load(...) gives it, not a {kind}")
    check_splits(sae.cfg, ranks)
    local = _twin(sae)
    local.cfg = SAEConfig.from_dict({**sae.cfg.to_dict(), "d_sae": sae.d_sae // ranks.latents})
    _join(local, ranks)
    if ranks.latents > 1:
        for name, axis in axes_of(sae).items():
            module_name, _, own = name.rpartition(".")
            module = local.get_submodule(module_name) if module_name else None
            if module is None or getattr(module, own, None) is None:
                continue
            tensor = getattr(module, own)
            piece = part(tensor.detach(), axis, ranks).clone(memory_format=torch.preserve_format)
            setattr(module, own, _like(tensor, piece))
        for name, p in local.named_parameters():  # those that all latents share
            if name not in axes_of(sae):
                module_name, _, own = name.rpartition(".")
                setattr(local.get_submodule(module_name), own, _like(p, p.detach().clone()))
        for module in local.modules():
            for own, buffer in module.named_buffers(recurse=False):
                setattr(module, own, buffer.clone())
    local.finished = sae.finished
    if not sae.finished:
        local.begin_with_these_weights()
    return local


def _like(tensor: Tensor, piece: Tensor) -> Tensor:
    return nn.Parameter(piece, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else piece


def _twin(module: Any) -> Any:
    """A module that shares every tensor with another, and whose other attributes are its own."""
    twin = object.__new__(type(module))
    twin.__dict__.update(
        module.__dict__,
        _parameters=dict(module._parameters),
        _buffers=dict(module._buffers),
        _modules={name: None if one is None else _twin(one) for name, one in module._modules.items()},
    )
    return twin


def _join(local: SAE, ranks: Ranks) -> None:
    """Make the parts of an SAE ask the other ranks."""
    n = local.cfg.d_sae
    dictionary, activation, density = local.dictionary, local.activation, local.density
    dictionary.d_sae = activation.d_sae = n
    dictionary.first_latent = ranks.latent_rank * n
    dictionary._screen_tables = type(dictionary._screen_tables)()
    if hasattr(dictionary, "heads"):
        dictionary.heads = dictionary.heads // ranks.latents
    kind = type(dictionary)
    dictionary.__class__ = type(f"Sharded{kind.__name__}", (ShardedDictionary, kind), {})
    activation.__class__ = SHARDED.get(type(activation), type(activation))
    density.__class__ = ShardedDensity
    for module in (dictionary, activation, density):
        module.__dict__["ranks"] = ranks


def part(tensor: Tensor, axis: int | None, ranks: Alone) -> Tensor:
    """This rank's part of a tensor of the whole SAE, a view."""
    if axis is None or ranks.latents == 1:
        return tensor
    n = tensor.shape[axis] // ranks.latents
    return tensor.narrow(axis, ranks.latent_rank * n, n)


def whole(tensor: Tensor, axis: int | None, ranks: Alone) -> Tensor:
    """A tensor of the whole SAE, from the part of each rank; in the same memory layout."""
    if axis is None or ranks.latents == 1:
        return tensor
    if axis == 1:
        return ranks.all_latents(tensor.detach().T.contiguous()).T
    return ranks.all_latents(tensor.detach().contiguous())
