"""TransformerLens 2.18, 3.9 and 4.3: HookedTransformer and TransformerBridge, recognised by their attributes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import nn

from saehooks.errors import SiteError
from saehooks.hosts.base import Host
from saehooks.hosts.hooked_transformer import watching_methods
from saehooks.hosts.layout import ActivationView
from saehooks.hosts.names import check_name, unknown_site
from saehooks.hosts.sequences import SequenceWatch, ancestors
from saehooks.hosts.site import Site, SiteInfo, check_head
from saehooks.hosts.widths import module_widths
from saehooks.known_bad import warn_of_known_bad

GATES = {
    "attn.hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
}
"""Hook points that fire only while a flag of the model's cfg is on, by the end of their name."""

NOT_ACTIVATIONS = (
    (re.compile(r".*hook_pattern"), "attention weights (batch, head, query, key)"),
    (re.compile(r".*hook_attn_scores"), "attention scores (batch, head, query, key)"),
    (re.compile(r".*hook_scale"), "one norm per token"),
    (re.compile(r".*hook_(sin|cos)|rotary_emb.*"), "angles of the rotary embedding"),
    (re.compile(r"(hook_tokens|(pos_)?embed\.hook_in)"), "token ids"),
    (re.compile(r".*attn\.[qk]_norm\..*"), "one norm per head (batch, head, pos, d_head)"),
)
"""Hook points that are no place for an SAE, and why."""

SILENT = re.compile(r".*attn\.(qkv\.hook_(in|out)|hook_hidden_states)")
"""Hook points of a bridge that no forward runs: they are not listed."""

PER_HEAD = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_rot_q", "hook_rot_k")
PER_HEAD_RESIDUAL = ("hook_result", "hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_in")
MLP_INSIDE = ("mlp.hook_pre", "mlp.hook_post", "mlp.hook_pre_linear")
RESIDUAL = re.compile(
    r"(.*\.)?(hook_(embed|pos_embed|resid_pre|resid_mid|resid_post|attn_out|mlp_out|mlp_in|normalized)"
    r"|(blocks\.\d+|attn|mlp|ln\w*|embed)\.hook_out|(blocks\.\d+|attn|mlp|ln\w*|unembed)\.hook_in)"
)


MISSES_THE_STREAM = "on a bridge, what is written here reaches the MLP and not the residual stream"
"""What to know of a bridge's hook_resid_mid."""


class TransformerLensHost(Host):
    """A HookedTransformer or a TransformerBridge, whose sites are its hook points."""

    family = "transformer_lens"

    def __init__(self, model: nn.Module, prefix: str = ""):
        super().__init__(model, prefix)
        if hasattr(model, "original_model"):  # a bridge, which runs transformers' own model
            warn_of_known_bad(("transformer-lens", "transformers"))

    def site(self, name: str, head: int | None = None) -> Site:
        check_name(name)
        given, name = name, name if name in self._points else self.without_prefix(name)
        point = self._points.get(name)
        if point is None:
            raise unknown_site(name, [one for one, hook in self._points.items() if not self._refusal(one, hook)])
        refusal = self._refusal(name, point)
        if refusal:
            raise SiteError(refusal)
        names = self._names_of(point)
        n_heads, per_head = self._heads(names)
        check_head(name, head, n_heads)
        width = self._width(names, point)
        if n_heads is not None:
            width = per_head if head is not None else n_heads * per_head
        portable = portable_name(names)
        return Site(
            name=portable,
            requested_name=given,
            module=point,
            width=width,
            head=head,
            aliases=tuple(one for one in names if one != portable),
            note=self._note(names, point),
            view=ActivationView(conversion=getattr(point, "hook_conversion", None), heads=n_heads, head=head),
        )

    def list(self) -> list[SiteInfo]:
        infos = []
        for point in {id(point): point for point in self._points.values()}.values():
            names = self._names_of(point)
            portable = portable_name(names)
            if any(self._carries_no_activations(one) or SILENT.fullmatch(one) for one in names):
                continue
            n_heads, per_head = self._heads(names)
            width = self._width(names, point) if n_heads is None else n_heads * per_head
            if width is None and self._cfg("d_model") is not None:
                continue
            shape = "batch pos width" if n_heads is None else f"batch pos ({n_heads} heads x {per_head})"
            aliases = tuple(one for one in names if one != portable)
            infos.append(SiteInfo(portable, aliases, width, shape, self._note(names, point)))
        return infos

    def around(self, sites: Iterable[Site]) -> Sequence[nn.Module]:
        inner = getattr(self.model, "original_model", None)
        roots = [self.model] if inner is None else [self.model, inner]
        found = [one for site in sites for one in ancestors(roots, site.module)]
        # The model itself is entered by its methods too, past all hooks.
        return list({id(one): one for one in found if one is not self.model}.values())

    def watching(self, watch: SequenceWatch) -> AbstractContextManager[None]:
        return watching_methods(self.model, watch)

    def describe(self) -> dict[str, Any]:
        return {"family": self.family, "model_name": self._model_name, "processing": processing(self.model)}

    def entry_points(self) -> Iterator[tuple[nn.Module, str]]:
        yield self.model, "forward"

    def run(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            return self.model(**{"return_type": None, **batch})
        return self.model(batch, return_type=None)

    @cached_property
    def _points(self) -> dict[str, nn.Module]:
        return dict(self.model.hook_dict)  # type: ignore[arg-type]

    @property
    def _model_name(self) -> Any:
        return self._cfg("model_name") if hasattr(self.model, "cfg") else type(self.model).__name__

    def _cfg(self, name: str) -> Any:
        return getattr(getattr(self.model, "cfg", None), name, None)

    def _names_of(self, point: nn.Module) -> Sequence[str]:
        return self._names_by_point[id(point)]

    @cached_property
    def _names_by_point(self) -> dict[int, tuple[str, ...]]:
        names: dict[int, tuple[str, ...]] = {}
        for name, point in self._points.items():
            names[id(point)] = (*names.get(id(point), ()), name)
        return names

    def _refusal(self, name: str, point: nn.Module) -> str | None:
        """Why an SAE cannot be attached to an existing hook point, or None."""
        for one in self._names_of(point):
            why = self._carries_no_activations(one)
            if why:
                return f"site '{name}' carries {why}, not activations (batch, pos, width)"
        gate = self._gate(name, point)
        if gate:
            return f"site '{name}' never fires while cfg.{gate} is False: call model.set_{gate}(True) first"
        return None

    @staticmethod
    def _carries_no_activations(name: str) -> str | None:
        return next((why for pattern, why in NOT_ACTIVATIONS if pattern.fullmatch(name)), None)

    def _gate(self, name: str, point: nn.Module) -> str | None:
        """The flag that keeps a point from firing; the point's own name decides, as an alias may always fire."""
        own = getattr(point, "name", None) or name
        flag = next((flag for ending, flag in GATES.items() if own.endswith(ending)), None)
        return flag if flag is not None and hasattr(self.model, "cfg") and not self._cfg(flag) else None

    def _note(self, names: Sequence[str], point: nn.Module) -> str:
        gate = self._gate(names[0], point)
        if gate:
            return f"off: model.set_{gate}(True) switches it on"
        if hasattr(self.model, "original_model") and any(one.endswith("hook_resid_mid") for one in names):
            return MISSES_THE_STREAM
        return ""

    def _heads(self, names: Sequence[str]) -> tuple[int, int] | tuple[None, int]:
        """(number of heads, width of one) where hooks see (batch, pos, heads, width), else (None, 0)."""
        ends = {one.rpartition(".")[2] for one in names}
        n_heads, d_head = self._cfg("n_heads"), self._cfg("d_head")
        if n_heads is None or d_head is None:
            return None, 0
        if ends & {"hook_k", "hook_v", "hook_rot_k"}:
            return (self._cfg("n_key_value_heads") or n_heads), d_head
        if ends & set(PER_HEAD):
            return n_heads, d_head
        return (n_heads, self._cfg("d_model")) if ends & set(PER_HEAD_RESIDUAL) else (None, 0)

    def _width(self, names: Sequence[str], point: nn.Module) -> int | None:
        own = self._component_width(point)
        if own is not None:
            return own
        if any(one.endswith(MLP_INSIDE) for one in names):
            return self._cfg("d_mlp")
        return self._cfg("d_model") if any(RESIDUAL.fullmatch(one) for one in names) else None

    def _component_width(self, point: nn.Module) -> int | None:
        """In a bridge: the width of the layer whose input or output this point is."""
        path, _, last = (getattr(point, "name", None) or "").rpartition(".")
        if last not in ("hook_in", "hook_out") or not hasattr(self.model, "original_model"):
            return None
        try:
            layer = self.model.get_submodule(path).original_component
        except AttributeError:
            return None
        if not isinstance(layer, nn.Module):
            return None
        widths = module_widths(layer)
        return widths.into if last == "hook_in" else widths.out


def portable_name(names: Sequence[str]) -> str:
    """The name that every version of TransformerLens knows, among the names of one hook point.

    >>> portable_name(["blocks.0.hook_in", "blocks.0.hook_resid_pre"])
    'blocks.0.hook_resid_pre'
    """
    return min(names, key=lambda one: (one.endswith((".hook_in", ".hook_out")), len(one)))


def processing(model: Any) -> dict[str, Any]:
    """How the weights were processed, as far as the model shows: an SAE fits one kind of residual stream only.

    Returns:
        ``folded``: layer norms are folded into the next layers; ``centered``: what is written to the residual
        stream has mean zero. None where that is not known.
    """
    if hasattr(model, "original_model"):
        folded = _has_plain_norms(model) if getattr(model, "compatibility_mode", False) else False
    else:
        folded = str(getattr(getattr(model, "cfg", None), "normalization_type", None)).endswith("Pre")
    return {"folded": folded, "centered": _is_centered(model)}


def _has_plain_norms(model: Any) -> bool | None:
    try:
        return bool((model.blocks[0].ln1.weight == 1).all())
    except (AttributeError, IndexError, TypeError):
        return None


def _is_centered(model: Any) -> bool | None:
    try:
        rows = model.W_E.detach()[:64].float()
    except (AttributeError, RuntimeError):
        return None
    return bool(rows.mean(-1).abs().max() <= 1e-4 * rows.abs().max()) if torch.isfinite(rows).all() else None
