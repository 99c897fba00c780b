"""open_clip and OpenAI's CLIP: two towers of blocks, under friendly names and module paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn

from saehooks.errors import SiteError
from saehooks.sites.base import ForwardCall, Handle, Handles, Host, Site, SiteInfo, check_head, is_tokens
from saehooks.sites.layout import View
from saehooks.sites.module import is_fused, refuse_unfired
from saehooks.sites.names import unknown_site
from saehooks.sites.widths import module_widths

BLOCK_LISTS = {
    "visual": ("visual.transformer.resblocks", "visual.trunk.blocks"),
    "text": ("transformer.resblocks", "text.transformer.resblocks", "text.transformer.encoder.layer"),
}
"""Where the blocks of each tower are, by the kind of tower; the first that exists is the one."""


class _Place(NamedTuple):
    path: str
    module: nn.Module
    slot: str


class OpenClipHost(Host):
    """A CLIP, whose sites are ``visual.blocks.N.hook_*``, ``text.blocks.N.hook_*`` and every module path."""

    family = "open_clip"

    def site(self, name: str, head: int | None = None) -> Site:
        place = self._friendly.get(name)
        if place is None:
            if name.endswith("hook_resid_mid") and name.replace("_mid", "_post") in self._friendly:
                raise SiteError(
                    f"site '{name}' cannot be hooked: CLIP's blocks add the attention inside their forward; "
                    f"take '{name.replace('_resid_mid', '_attn_out')}' or '{name.replace('_mid', '_post')}'"
                )
            if name not in self._modules or not name:
                raise unknown_site(name, [*self._friendly, *(one for one in self._modules if one)])
            refuse_unfired(name, self._modules)
            place = _Place(name, self._modules[name], "out")
        check_head(name, head, None)
        friendly = self._friendly_names.get((id(place.module), place.slot))
        aliases = [one for one in (friendly, place.path if place.slot == "out" else None) if one]
        portable = aliases[0] if aliases else name
        return Site(
            name=portable,
            given=name,
            module=place.module,
            width=self._width(place),
            slot=place.slot,
            aliases=tuple(one for one in aliases if one != portable),
            view=View(batch_first=self._batch_first(place.path)),
        )

    def list(self) -> list[SiteInfo]:
        infos, seen = [], set()
        for name, place in self._friendly.items():
            seen.add((id(place.module), place.slot))
            paths = (place.path,) if place.slot == "out" else ()
            infos.append(SiteInfo(name, paths, self._width(place), "batch token width", self._note(name)))
        for path, module in self._modules.items():
            place = _Place(path, module, "out")
            if (id(module), "out") in seen or is_fused(path, self._modules) or not self._tower_of(path):
                continue
            width = self._width(place)
            if width is not None and any(path.startswith(blocks + ".") for blocks, _ in self._blocks.values()):
                infos.append(SiteInfo(path, (), width, "batch token width"))
        return infos

    def watch(self, fn: Callable[[ForwardCall], None]) -> Handle:
        def visual(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            fn(ForwardCall(None, tower="visual"))

        def text(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = next((value for value in (*args, *kwargs.values()) if is_tokens(value)), None)
            fn(ForwardCall(tokens, tower="text"))

        handles = [self.model.visual.register_forward_pre_hook(visual, with_kwargs=True)]  # type: ignore[operator,union-attr]
        begins_text = getattr(self.model, "text", None) or getattr(self.model, "token_embedding", None)
        if begins_text is not None:
            handles.append(begins_text.register_forward_pre_hook(text, with_kwargs=True))
        return Handles(handles)

    def describe(self) -> dict[str, Any]:
        name = getattr(self.model, "model_name", None) or type(self.model).__name__
        return {"family": self.family, "model_name": name, "processing": {}}

    def entry_points(self) -> Iterator[tuple[nn.Module, str]]:
        for name in ("forward", "encode_image", "encode_text"):
            if hasattr(self.model, name):
                yield self.model, name
        for tower in ("visual", "text"):
            if isinstance(getattr(self.model, tower, None), nn.Module):
                yield getattr(self.model, tower), "forward"

    def run(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            return self.model(**batch)
        if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
            batch = batch[0]  # a loader's (images, labels)
        if is_tokens(batch):
            return self.model.encode_text(batch)  # type: ignore[operator]
        if isinstance(batch, Tensor) and batch.dim() == 4:
            return self.model.encode_image(batch)  # type: ignore[operator]
        raise SiteError(
            f"a CLIP runs on images (batch, 3, height, width) or on token ids (batch, pos), got {_described(batch)}"
        )

    def tower(self, site: Site) -> str | None:
        path = next((path for path, module in self._modules.items() if module is site.module), "")
        return self._tower_of(path)

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules())

    @cached_property
    def _blocks(self) -> dict[str, tuple[str, tuple[nn.Module, ...]]]:
        """tower -> (path of its list of blocks, the blocks)"""
        found = {}
        for tower, paths in BLOCK_LISTS.items():
            path = next((one for one in paths if one in self._modules), None)
            if path is not None:
                found[tower] = (path, tuple(self._modules[path].children()))
        return found

    @cached_property
    def _friendly(self) -> dict[str, _Place]:
        """friendly name -> place"""
        places = {}
        for tower, (path, blocks) in self._blocks.items():
            for i, block in enumerate(blocks):
                start = f"{tower}.blocks.{i}"
                places[f"{start}.hook_resid_pre"] = _Place(f"{path}.{i}", block, "in")
                for hook, names in (("attn_out", ("attn", "ls_1", "ls1")), ("mlp_out", ("mlp", "ls_2", "ls2"))):
                    last = _last_called(block, names)
                    if last is not None:
                        places[f"{start}.hook_{hook}"] = _Place(f"{path}.{i}.{last}", getattr(block, last), "out")
                places[f"{start}.hook_resid_post"] = _Place(f"{path}.{i}", block, "out")
        return places

    @cached_property
    def _friendly_names(self) -> dict[tuple[int, str], str]:
        return {(id(place.module), place.slot): name for name, place in self._friendly.items()}

    def _tower_of(self, path: str) -> str | None:
        if path == "visual" or path.startswith("visual."):
            return "visual"
        return "text" if path.startswith(("text.", "transformer.", "token_embedding", "ln_final")) else None

    def _width(self, place: _Place) -> int | None:
        widths = module_widths(place.module)
        own = widths.into if place.slot == "in" else widths.out
        if own is not None:
            return own
        block = self._block_of(place.path)
        parts = block.modules() if block is not None else ()
        norm = next((one for one in parts if "norm" in type(one).__name__.lower()), None)
        residual = module_widths(norm).out if norm is not None else None
        # A block, and what it adds to the residual stream, are as wide as its first norm.
        inside = place.path.rpartition(".")[2]
        whole = block is place.module or inside in ("attn", "mlp", "ls_1", "ls_2", "ls1", "ls2", "ln_1", "ln_2")
        return residual if whole else None

    def _block_of(self, path: str) -> nn.Module | None:
        for start, blocks in self._blocks.values():
            if path.startswith(start + "."):
                return blocks[int(path[len(start) + 1 :].split(".")[0])]
        return None

    def _batch_first(self, path: str) -> bool:
        """Whether the module at ``path`` sees (batch, token, width); the attention of its block says so."""
        block = self._block_of(path)
        attention = getattr(block, "attn", None) if block is not None else None
        return bool(getattr(attention, "batch_first", True))

    def _note(self, name: str) -> str:
        tower, (_, blocks) = next(item for item in self._blocks.items() if name.startswith(item[0] + "."))
        last = name == f"{tower}.blocks.{len(blocks) - 1}.hook_resid_post"
        return "only the pooled token is read after it" if last and tower == "visual" else ""


def _last_called(block: nn.Module, names: tuple[str, ...]) -> str | None:
    """The last of a chain of submodules that changes what passes; Identity is skipped."""
    there = [one for one in names if isinstance(getattr(block, one, None), nn.Module)]
    working = [one for one in there if not isinstance(getattr(block, one), nn.Identity)]
    return working[-1] if working else None


def _described(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
