"""SAEs that were trained on another model, or at another site, than they are attached to."""

from __future__ import annotations

import re
import sys
import warnings
from typing import Any

from saehooks.errors import SiteError
from saehooks.hosts.base import Host
from saehooks.hosts.site import Site
from saehooks.sae import SparseCoder

ALIASES = {"gpt2-small": "gpt2", "distillgpt2": "distilgpt2", "mistral-7b": "mistral-7b-v0.1"}
"""TransformerLens' short names of models, for when its own table is not loaded."""

TABLES = ("transformer_lens.supported_models", "transformer_lens.loading_from_pretrained")
"""Where TransformerLens keeps that table, by version."""

STREAM = re.compile(r"(?P<start>.*?)(blocks|layers|layer|block|resblocks|h)\.(?P<layer>\d+)(\.hook_(?P<hook>\w+))?")
"""Names of the residual stream around a block; a module's path is its output."""


def warn_if_foreign(sae: SparseCoder, host: Host, site: Site) -> None:
    """Warn when the SAE remembers another model, processing of its weights or site than it is being attached to."""
    here, metadata = host.describe(), sae.cfg.metadata
    then, now = metadata.get("model_name"), here.get("model_name")
    if not same_model(then, now):
        warn(f"this SAE was trained on {then!r}, and is being attached to {now!r}")
    then, now = metadata.get("processing") or {}, here.get("processing") or {}
    known = [k for k in then if then[k] is not None and now.get(k) is not None]
    differing = [f"{k}={then[k]!r} there, {now[k]!r} here" for k in known if then[k] != now[k]]
    if differing:
        warn(
            "this SAE was trained on a model whose weights were processed differently, which changes the activations: "
            + "; ".join(differing)
        )
    if sae.hook_name is not None and not _same_place(sae.hook_name, metadata.get("head"), host, site):
        warn(f"this SAE was trained at '{sae.hook_name}', and is being attached at '{site.requested_name}'")


def same_model(one: Any, other: Any) -> bool:
    """Whether two names may be of one model: unknown names may.

    >>> same_model("openai-community/gpt2", "gpt2-small"), same_model("gpt2", "pythia-70m"), same_model(None, "gpt2")
    (True, False, True)
    """
    return not one or not other or _bare(one) == _bare(other)


def warn(message: str) -> None:
    warnings.warn(message, stacklevel=6)


def _bare(model_name: Any) -> str:
    """A model's name without its organisation, under the name that its authors gave it.

    >>> _bare("openai-community/GPT2"), _bare("gpt2-small")
    ('gpt2', 'gpt2')
    """
    name = str(model_name).rstrip("/").rsplit("/", 1)[-1].lower()
    for table in TABLES:
        for official, aliases in getattr(sys.modules.get(table), "MODEL_ALIASES", {}).items():
            if name in (one.lower() for one in aliases):
                return official.rsplit("/", 1)[-1].lower()
    return ALIASES.get(name, name)


def _same_place(then: str, head: int | None, host: Host, site: Site) -> bool:
    """Whether a site's name, in this family of models or in another one, means this site."""
    if then in (site.name, site.requested_name, *site.aliases):
        return head in (None, site.head)
    try:
        return host.site(then, head).key == site.key or _boundary(then) == _boundary(site.name) is not None
    except SiteError:
        return _boundary(then) == _boundary(site.name) is not None


def _boundary(name: str) -> tuple[str, int] | None:
    """Which point of the residual stream a name means: the tower, and the number of blocks before it.

    >>> _boundary("blocks.7.hook_resid_post") == _boundary("blocks.8.hook_resid_pre") == _boundary("model.layers.7")
    True
    >>> _boundary("visual.blocks.7.hook_resid_post"), _boundary("blocks.7.hook_mlp_out")
    (('visual', 8), None)
    """
    found = STREAM.fullmatch(name)
    if found is None or found["hook"] not in (None, "resid_pre", "resid_post", "in", "out"):
        return None
    tower = next((one for one in ("visual", "vision", "text", "encoder", "decoder") if one in found["start"]), "")
    return tower, int(found["layer"]) + (found["hook"] not in ("resid_pre", "in"))
