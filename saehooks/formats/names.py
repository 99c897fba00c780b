"""The site that an SAE belongs to, from what its file or the file's path calls it."""

from __future__ import annotations

import re

KINDS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "resid": "hook_resid_post",
    "mlp_out": "hook_mlp_out",
    "mlp": "hook_mlp_out",
    "attn_out": "hook_attn_out",
    "attention": "hook_attn_out",
    "attn": "hook_attn_out",
    "self_attn": "hook_attn_out",
}
"""Sites of a block, by the names that files and modules have for them."""


def block_site(layer: int, kind: str) -> str | None:
    """TransformerLens' name of a site of a block, or None where ``kind`` is no word for one."""
    return f"blocks.{layer}.{KINDS[kind]}" if kind in KINDS else None


def site_of_module(module: str) -> str | None:
    """TransformerLens' name of what a module of Hugging Face puts out, such as ``"model.layers.5.mlp"``.

    >>> site_of_module("layers.5"), site_of_module("h.3.mlp"), site_of_module("embed_tokens")
    ('blocks.5.hook_resid_post', 'blocks.3.hook_mlp_out', 'hook_embed')
    """
    if re.fullmatch(r"(?:\w+\.)*(?:embed_tokens|wte|embed_in)", module):
        return "hook_embed"
    found = re.fullmatch(r"(?:\w+\.)*(?:layers|h|blocks)[._](\d+)(?:\.(\w+))?", module)
    return block_site(int(found[1]), found[2] or "resid_post") if found else None


def layer_in(name: str) -> int | None:
    """The layer that a path names, such as ``.../layer_12/width_16k``; the last one if it names several."""
    found = re.findall(r"(?:[Ll]ayers?|[Bb]locks?|[-_/]L)[._]?(\d+)", f"/{name}")
    return int(found[-1]) if found else None
