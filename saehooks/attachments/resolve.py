"""Where an SAE belongs: the one answer that attaching, measuring and training share."""

from __future__ import annotations

from typing import Any

from saehooks.errors import ConfigError, SiteError, WidthError
from saehooks.hosts import Host, Site
from saehooks.sae import SparseCoder, Transcoder


def check_sae(given: Any) -> None:
    """Refuse what is no SAE, such as a model or batches in its place.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(given, SparseCoder):
        raise ConfigError(
            f"expected an SAE, got {type(given).__name__}: sh.load(folder) loads one, and the model comes first, as in "
            "sh.read(model, sae)"
        )


def name_of(sae: SparseCoder, at: str | None = None, head: int | None = None) -> tuple[str, int | None]:
    """Site name and head: as asked for, else as the SAE remembers.

    Raises:
        SiteError: neither says where.
    """
    check_sae(sae)
    if at is not None:
        return at, head
    if sae.hook_name is None:
        raise SiteError("this SAE does not know its site: pass at=..., one of the names in sh.sites(model)")
    return sae.hook_name, sae.cfg.metadata.get("head") if head is None else head


def written_by(host: Host, sae: Transcoder, at: str | None = None) -> Site:
    """The site that a transcoder writes.

    Raises:
        SiteError: no such site, or none was named.
        WidthError: the transcoder writes another width.
    """
    name = at or sae.hook_name_out
    if name is None:
        raise SiteError("this transcoder does not know which site it writes: pass at=(read, written)")
    site = host.site(name)
    if site.width is not None and site.width != sae.d_out:
        raise WidthError(f"the transcoder writes d_out={sae.d_out}, but '{site.name}' is {site.width} wide")
    return site.of_width(sae.d_out)


def find(host: Host, sae: SparseCoder, at: str | None = None, head: int | None = None) -> Site:
    """The site of an SAE in a model, of a width that fits.

    Raises:
        SiteError: no such site, or none was named.
        WidthError: the SAE reads another width.
    """
    site = host.site(*name_of(sae, at, head))
    if site.width is not None:
        check_width(sae, site, site.width)
    return site.of_width(sae.d_in)


def check_width(sae: SparseCoder, site: Site, width: int) -> None:
    """Raise WidthError unless the SAE reads activations of this width."""
    if sae.d_in != width:
        raise WidthError(
            f"the SAE has d_in={sae.d_in}, but '{site.name}' is {width} wide; "
            "sh.sites(model) lists all sites with their widths"
        )
