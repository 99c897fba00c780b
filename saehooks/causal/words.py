"""What latents stand for, beside the numbers of a result: by an index that was made of these very latents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from saehooks.errors import ConfigError
from saehooks.show.values import Markup


class Origin(NamedTuple):
    """Which latents a result is about: the words of others would be wrong."""

    site: str
    """Name of the site."""
    head: int | None = None
    """The one attention head, or None for all of them joined."""
    fingerprint: str = ""
    """Of the SAE, as `SAE.fingerprint` gives it; "" where it is not known."""


def check_index(index: Any, *origins: Origin) -> None:
    """Refuse an index, or one of a mapping by site, that is of other latents than a result.

    Args:
        index: a `saehooks.LatentIndex`, of any of the origins; a mapping of several by site; or None.
    Raises:
        ConfigError: it is of another site, head or SAE, or it is no index at all.
    """
    if not isinstance(index, Mapping):
        return _check_one(index, origins)
    for site, found in index.items():
        here = [one for one in origins if one.site == site]
        if not here:
            raise ConfigError(f"index= holds an index for {site!r}; the latents are at {_listed(origins)}")
        _check_one(found, here)


def _check_one(index: Any, origins: Any) -> None:
    if index is None:
        return
    if not hasattr(index, "of_trace"):
        load = f"; write sh.LatentIndex.load({str(index)!r})" if isinstance(index, (str, Path)) else ""
        raise ConfigError(f"index= takes a LatentIndex, which sh.survey makes; got {type(index).__name__}{load}")
    head = index.metadata["head"]
    here = [one for one in origins if one.site == index.site and one.head == head]
    if not here:
        raise ConfigError(
            f"this index is of the latents at {_named(index.site, head)}, not of those at {_listed(origins)}: its "
            f"words would be wrong; sh.survey(model, sae, batches, at={origins[0].site!r}) makes one of these"
        )
    for one in here:
        if one.fingerprint:
            index.check_fingerprint(one.fingerprint)


def check_ranking(ranking: Any, origin: Origin) -> None:
    """Refuse the latents of a ranking of another site, head or SAE.

    Raises:
        ConfigError: they are.
    """
    theirs: Origin = ranking.origin
    if (theirs.site, theirs.head) != (origin.site, origin.head):
        raise ConfigError(
            f"the ranking is of latents at {_listed([theirs])}, and the SAE is attached at {_listed([origin])}"
        )
    if theirs.fingerprint and theirs.fingerprint != origin.fingerprint:
        raise ConfigError("the ranking is of another SAE's latents: rank those of this one with sh.rank_latents")


def _named(site: str, head: int | None) -> str:
    return f"'{site}'" if head is None else f"'{site}', head {head}"


def _listed(origins: Any) -> str:
    return " and ".join(_named(one.site, one.head) for one in origins)


def survey_note(index: Any) -> str:
    """For a caption: words from an interrupted survey are from part of its data."""
    found = list(index.values()) if isinstance(index, Mapping) else [index]
    partial = next((one for one in found if one is not None and not one.complete), None)
    return "" if partial is None else f"; words from an interrupted survey of {partial.sequences:,} sequences"


def words_of(index: Any, site: str, latent: int, n: int = 4) -> str:
    """What a latent stands for, by an index of latents, or a mapping of several by site; "" where there is none.

    >>> words_of(None, "blocks.8.hook_resid_pre", 901)
    ''
    """
    found = index.get(site) if isinstance(index, Mapping) else index
    if found is None or getattr(found, "site", site) != site:
        return ""
    return found.words(latent, n)


def context_of(index: Any, site: str, latent: int) -> Markup:
    """Where a latent is strongest, shaded, for a cell of a table; empty where there is no index of the site."""
    found = index.get(site) if isinstance(index, Mapping) else index
    if found is None or getattr(found, "site", site) != site:
        return Markup()
    return found.context_html(latent)


def labelled(index: Any, site: str, latent: int) -> str:
    """A latent by its number and its words: what a plot writes."""
    return f"{latent} {words_of(index, site, latent, 3)}".rstrip()
