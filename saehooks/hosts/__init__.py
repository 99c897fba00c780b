"""The places in a model where an SAE can be attached: the only room that knows model families."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from saehooks.errors import SiteError
from saehooks.hosts.base import Host
from saehooks.hosts.module import ModuleHost
from saehooks.hosts.nested import NestedHost
from saehooks.hosts.open_clip import OpenClipHost
from saehooks.hosts.site import Handle, Site, SiteInfo
from saehooks.hosts.table import SiteTable
from saehooks.hosts.transformer_lens import TransformerLensHost
from saehooks.hosts.wrappers import unwrapped

__all__ = [
    "Handle",
    "Host",
    "ModuleHost",
    "OpenClipHost",
    "Site",
    "SiteInfo",
    "SiteTable",
    "TransformerLensHost",
    "host",
    "sites",
]


def host(model: Any) -> Host:
    """See a model as a set of sites.

    Args:
        model: a TransformerBridge or HookedTransformer, an open_clip model, or any ``nn.Module``. A model's attributes
            decide its family, so no model library is imported.
    Raises:
        SiteError: the model cannot carry hooks.
    """
    if not isinstance(model, nn.Module):
        raise SiteError(
            f"a model must be a torch.nn.Module, got {type(model).__name__}: open it first, as with "
            "TransformerBridge.boot_transformers(name) or open_clip.create_model(name)"
        )
    inside, prefix = unwrapped(model)
    family = family_of(inside)
    if family is not None:
        return family(inside, prefix)
    parts = dict(_parts(inside))
    return NestedHost(inside, prefix, parts) if parts else ModuleHost(inside, prefix)


def family_of(model: nn.Module) -> type[Host] | None:
    """The family of a model, by what it offers; None for a plain module."""
    if hasattr(model, "hook_dict"):
        return TransformerLensHost
    stack = getattr(getattr(model, "transformer", None), "resblocks", None)
    if stack is not None or (isinstance(getattr(model, "visual", None), nn.Module) and hasattr(model, "encode_image")):
        return OpenClipHost
    return None


def _parts(model: nn.Module) -> Iterator[tuple[str, type[Host]]]:
    """The path and the family of each outermost part of a plain module that is none itself."""
    done: list[str] = []
    for path, module in model.named_modules():
        if path and not any(path.startswith(f"{one}.") for one in done):
            family = family_of(module)
            if family is not None:
                done.append(path)
                yield path, family


def sites(model: Any) -> SiteTable:
    """List every place in a model where an SAE can be attached, with its width.

    >>> sites(nn.Sequential(nn.Linear(3, 5), nn.ReLU())).names
    ['0']
    """
    return SiteTable(host(model).list())
