"""Turning a name that does not exist into the name that was meant."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from torch.nn import Module

from saehooks.errors import SiteError

SEVERAL = re.compile(r"\{(\d+)[-,\d]*\}")
"""How a table of sites writes the numbers of a name."""

LAYER = re.compile(r"(?<=\.)-?\d+(?=\.|$)")


def check_name(name: Any) -> None:
    """Refuse anything that is not a name.

    Raises:
        SiteError: ``name`` is not a string.
    """
    if not isinstance(name, str) or not name:
        shown = f"a module, {type(name).__name__}" if isinstance(name, Module) else repr(name)
        raise SiteError(
            f"a site is a name such as 'blocks.8.hook_resid_pre', got {shown}; sh.sites(model) lists all names"
        )
    if SEVERAL.search(name):
        one = SEVERAL.sub(r"\1", name)
        raise SiteError(f"'{name}' stands for several sites: take one of its numbers, such as '{one}'")


def unknown_site(name: str, known: Iterable[str]) -> SiteError:
    """The error for a name that no site has, naming the nearest ones.

    >>> str(unknown_site("blocks.8.resid_pre", ["blocks.8.hook_resid_pre", "blocks.8.hook_mlp_out"]))
    "no site 'blocks.8.resid_pre'; did you mean 'blocks.8.hook_resid_pre'?"
    >>> str(unknown_site("blocks.9.hook_x", ["blocks.0.hook_x", "blocks.1.hook_x"]))
    "no site 'blocks.9.hook_x': 'blocks.N.hook_x' exists for N in 0 .. 1"
    """
    names = list(dict.fromkeys(known))
    layers = _layers_of(name, names)
    if layers:
        pattern = LAYER.sub("N", name, count=1)
        return SiteError(f"no site '{name}': '{pattern}' exists for N in {min(layers)} .. {max(layers)}")
    near = suggestions(name, names)
    if not near:
        return SiteError(f"no site '{name}'; sh.sites(model) lists all {len(names)}")
    return SiteError(f"no site '{name}'; did you mean {' or '.join(repr(one) for one in near)}?")


def suggestions(name: str, names: list[str], n: int = 2) -> list[str]:
    """The names nearest to ``name``, best first: first those that differ only by ``hook_`` or by what comes before."""
    bare = name.replace("hook_", "")
    exact = [one for one in names if one.replace("hook_", "") == bare]
    if exact:
        return exact[:1]
    longer = [one for one in names if bare and one.replace("hook_", "").endswith("." + bare)]
    if longer:
        return longer[:n]
    same_layer = [one for one in names if re.findall(r"\d+", one) == re.findall(r"\d+", name)]
    return get_close_matches(name, same_layer, n, 0.6) or get_close_matches(name, names, n, 0.6)


def _layers_of(name: str, names: list[str]) -> list[int]:
    """The layers at which the same name exists, when only the first number of ``name`` is wrong."""
    match = LAYER.search(name)
    if match is None:
        return []
    before, after = name[: match.start()], name[match.end() :]
    pattern = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    return [int(found.group(1)) for found in map(pattern.fullmatch, names) if found]
