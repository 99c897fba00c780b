"""Any ``nn.Module`` by module path, such as a plain Hugging Face model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from saehooks.errors import ConfigError, SiteError
from saehooks.hosts.base import Host
from saehooks.hosts.calls import is_pos_first
from saehooks.hosts.layout import ActivationView
from saehooks.hosts.names import check_name, unknown_site
from saehooks.hosts.pooling import end_of_text, reads_first, up_to
from saehooks.hosts.sequences import Columns, ancestors
from saehooks.hosts.site import Site, SiteInfo, check_head
from saehooks.hosts.towers import tower_calls, tower_of, two_towers
from saehooks.hosts.widths import OutputWidths, channels_axis
from saehooks.hosts.wrappers import ModuleNames

LENS_NAME = re.compile(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|in|out)")

ATTENTION = re.compile(r"(^|[._])(attn|attention)(\d*|_pool)\.", re.IGNORECASE)
"""Names of what is inside of an attention layer."""


class PathHost(Host):
    """A host that finds modules by their path, and knows how wide their outputs are."""

    @cached_property
    def _modules(self) -> ModuleNames:
        return ModuleNames(self.model)

    @cached_property
    def _widths(self) -> OutputWidths:
        return OutputWidths(self._modules)


class ModuleHost(PathHost):
    """A model whose sites are the outputs of its submodules.

    >>> host = ModuleHost(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)))
    >>> [(info.name, info.width) for info in host.list()]
    [('0', 5), ('1', 2)]
    """

    family = "module"

    def site(self, name: str, head: int | None = None) -> Site:
        check_name(name)
        found = self._modules.find(self.without_prefix(name))
        if found is None:
            raise self._unknown(name)
        refuse_uncalled(found, self._modules)
        check_head(name, head, None)
        module, width = self._modules[found], self._widths.of(found)
        return Site(
            name=found,
            requested_name=name,
            module=module,
            width=width,
            aliases=self._aliases(found),
            view=replace(map_view(found, module, width), batch_first=not self._is_pos_first(found)),
        )

    def list(self) -> list[SiteInfo]:
        infos = []
        for name in filter(None, self._modules):
            width = self._widths.of(name)
            if (width is not None or self._is_block(name)) and why_uncalled(name, self._modules) is None:
                shape = "batch place width" if channels_axis(self._modules[name]) == "first" else "batch pos width"
                infos.append(SiteInfo(name, self._aliases(name), width, shape))
        return infos

    def _aliases(self, name: str) -> tuple[str, ...]:
        """The path of a module that wrappers stand around."""
        path = self.prefix + self._modules.path_of(self._modules[name])
        return () if path == name else (path,)

    def _is_pos_first(self, name: str) -> bool:
        """Whether a module is, or lies in, one of torch's layers that take (pos, batch, width)."""
        parts = name.split(".")
        inside = (self._modules.get(".".join(parts[:i])) for i in range(len(parts) + 1))
        return any(one is not None and is_pos_first(one) for one in inside)

    def _is_block(self, name: str) -> bool:
        """Whether a module is one of a list of blocks, whose width only a forward pass may tell."""
        above = self._modules.get(name.rpartition(".")[0])
        return isinstance(above, nn.ModuleList) and any(True for _ in self._modules[name].parameters())

    def padding(self, module: nn.Module, tokens: Tensor) -> Tensor | None:
        end = end_of_text(module, tokens)
        return None if end is None else up_to(end, tokens.shape[1])

    def pooled(self, site: Site, columns: Columns) -> Tensor | None:
        pos = torch.arange(columns.shape[1], device=columns.device)
        for module in reversed(ancestors([self.model], site.module)):
            end = None if columns.tokens is None else end_of_text(module, columns.tokens)
            if end is not None:
                return pos == end[:, None]
            if reads_first(module):
                return pos == 0
        return None

    def describe(self) -> dict[str, Any]:
        config = getattr(self.model, "config", None)
        name = getattr(config, "_name_or_path", "") or type(self.model).__name__
        return {"family": self.family, "model_name": name, "processing": {}}

    def entry_points(self) -> Iterator[tuple[nn.Module, str]]:
        yield self.model, "forward"
        yield from tower_calls(self.model)

    def tower(self, site: Site) -> str | None:
        return tower_of(self.model, site.module)

    def run(self, batch: Any) -> Any:
        known = inspect.signature(self.model.forward).parameters
        cheap = {"use_cache": False, "logits_to_keep": 1}
        kwargs = {name: value for name, value in cheap.items() if name in known}
        if isinstance(batch, Mapping):
            return self.model(**{**kwargs, **batch})
        clip = two_towers(self.model)
        if clip is not None and isinstance(batch, Tensor):
            side = "image" if batch.is_floating_point() else "text"
            encode: Any = getattr(clip, f"get_{side}_features", None) or getattr(clip, f"encode_{side}")
            return encode(batch)
        try:
            return self.model(batch, **kwargs)
        except (TypeError, AttributeError) as error:
            texts = [batch] if isinstance(batch, str) else batch
            if isinstance(texts, (list, tuple)) and texts and all(isinstance(one, str) for one in texts):
                raise ConfigError(
                    f"this {type(self.model).__name__} takes no texts ({error}): give tokens, as "
                    "sh.TokenBatches(tokenizer, texts) makes them"
                ) from error
            raise

    def _unknown(self, name: str) -> SiteError:
        modules = self._modules
        ends = [one for one in modules if one.endswith(f".{name}")]
        if ends:
            return SiteError(f"no site '{name}'; did you mean {' or '.join(map(repr, ends[:3]))}?")
        meant = LENS_NAME.fullmatch(name)
        stacks = {path: one for path, one in modules.items() if isinstance(one, nn.ModuleList)}
        path = max(stacks, key=lambda one: len(stacks[one]), default=None)
        if meant is None or path is None:
            return unknown_site(name, [one for one in modules if one and why_uncalled(one, modules) is None])
        layer = int(meant.group(1)) - (meant.group(2) in ("resid_pre", "in"))
        instead = f"write '{path}.{layer}'" if 0 <= layer < len(stacks[path]) else f"its blocks are '{path}.N'"
        return SiteError(f"no site '{name}': sites of a {type(self.model).__name__} are module paths; {instead}")


def map_view(name: str, module: nn.Module, width: int | None) -> ActivationView:
    """How to see the output of a module: a feature map by its places, unless it lies inside of an attention layer.

    There an activation of four axes has one vector for each head.
    """
    return ActivationView(is_map=ATTENTION.search(name) is None, channels=channels_axis(module), width=width)


def why_uncalled(name: str, modules: ModuleNames) -> str | None:
    """Why a module never runs, with the module to take instead; None if it may."""
    parent = name.rpartition(".")[0]
    if modules.is_scripted(modules[name]):
        return "it is inside of a TorchScript module, where no hook is run; take the module that was scripted or traced"
    if name.endswith(".out_proj") and isinstance(modules.get(parent), nn.MultiheadAttention):
        return f"nn.MultiheadAttention uses its weights without calling it; take '{parent}', its output"
    if isinstance(modules[name], (nn.ModuleList, nn.ModuleDict)):
        return f"it is a container; take one of its members, such as '{name}.{next(iter(modules[name]._modules), 0)}'"
    return None


def refuse_uncalled(name: str, modules: ModuleNames) -> None:
    """Refuse a module that is never called.

    Raises:
        SiteError: names the module to take instead.
    """
    why = why_uncalled(name, modules)
    if why is not None:
        raise SiteError(f"site '{name}' never fires: {why}")
