"""open_clip and OpenAI's CLIP: two towers of blocks, under friendly names and module paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saehooks.errors import SiteError
from saehooks.hosts.base import is_tokens
from saehooks.hosts.calls import parameter_names, read_call
from saehooks.hosts.hooks import Slot
from saehooks.hosts.method_wrapper import replaced_method
from saehooks.hosts.module import PathHost, map_view, refuse_uncalled, why_uncalled
from saehooks.hosts.names import check_name, unknown_site
from saehooks.hosts.pooling import up_to
from saehooks.hosts.sequences import Columns, SequenceWatch
from saehooks.hosts.site import Site, SiteInfo, check_head
from saehooks.hosts.widths import module_widths

STACKS = {
    "visual": ("visual.transformer.resblocks", "visual.trunk.blocks"),
    "text": ("transformer.resblocks", "text.transformer.resblocks", "text.transformer.encoder.layer"),
}
"""Where the blocks of each tower of a CLIP are; the first path that exists is the one."""

ATTN_CHAIN, MLP_CHAIN = ("attn", "ln_attn", "ls_1", "ls1"), ("mlp", "ls_2", "ls2")
"""What a block runs before it adds to the residual stream, in order; the last that is no Identity is the site."""


class _Place(NamedTuple):
    path: str
    module: nn.Module
    slot: Slot


class OpenClipHost(PathHost):
    """A CLIP, whose sites are ``visual.blocks.N.hook_*``, ``text.blocks.N.hook_*`` and every module path.

    One tower by itself (``clip.visual``) works too: its sites are ``blocks.N.hook_*`` and its module paths.
    """

    family = "open_clip"

    def site(self, name: str, head: int | None = None) -> Site:
        check_name(name)
        inside = self.without_prefix(name)
        place = self._friendly.get(inside)
        if place is None:
            found = self._modules.find(inside)
            self._refuse_unknown(name, found)
            place = _Place(str(found), self._modules[str(found)], "out")
        check_head(name, head, None)
        friendly = self._friendly_names.get((id(place.module), place.slot))
        names = [one for one in (friendly, *self._paths(place)) if one]
        width = self._width(place)
        return Site(
            name=names[0],
            requested_name=name,
            module=place.module,
            width=width,
            slot=place.slot,
            aliases=tuple(names[1:]),
            note=self._note(names[0]),
            view=replace(map_view(place.path, place.module, width), batch_first=self._is_batch_first(place.path)),
        )

    def list(self) -> list[SiteInfo]:
        infos, seen = [], set()
        for name, place in self._friendly.items():
            seen.add((id(place.module), place.slot))
            infos.append(SiteInfo(name, self._paths(place), self._width(place), "batch token width", self._note(name)))
        for path, module in self._modules.items():
            width = self._width(_Place(path, module, "out"))
            if (id(module), "out") in seen or width is None or not self._is_listed(path):
                continue
            if why_uncalled(path, self._modules) is None and not isinstance(module, nn.Identity):
                infos.append(SiteInfo(path, self._paths(_Place(path, module, "out"))[1:], width, "batch token width"))
        return infos

    def _paths(self, place: _Place) -> tuple[str, ...]:
        """The module paths of a place: without wrappers, and with them."""
        path = self.prefix + self._modules.path_of(place.module)
        return () if place.slot == "in" else tuple(dict.fromkeys((place.path, path)))

    def _is_listed(self, path: str) -> bool:
        """Whether a module path is inside of a block, or of a tower without a stack of blocks."""
        start = "" if self._alone else f"{self._tower_of(path)}."
        return self._block_of(path) is not None or (bool(path) and start not in self._stacks)

    @contextmanager
    def watching(self, watch: SequenceWatch) -> Iterator[None]:
        model = self.model
        if self._alone or "text" in self._modules:
            yield  # the tower is a module, which is called with the tokens
            return

        def around(encode_text: Callable[..., Any]) -> Callable[..., Any]:
            names = parameter_names(encode_text)

            @wraps(encode_text)
            def watched(*args: Any, **kwargs: Any) -> Any:
                with watch.calling(model, read_call(model, names, args, kwargs)):
                    return encode_text(*args, **kwargs)

            return watched

        with replaced_method(model, "encode_text", around):
            yield

    def padding(self, module: nn.Module, tokens: Tensor) -> Tensor | None:
        end = self._end_of_text(tokens)
        return None if end is None else up_to(end, tokens.shape[1])

    def pooled(self, site: Site, columns: Columns) -> Tensor | None:
        pos = torch.arange(columns.shape[1], device=columns.device)
        if self.tower(site) == "visual":
            visual: Any = self._modules.get("visual", self.model)
            trunk = getattr(visual, "trunk", None)
            kind = getattr(visual, "pool_type", "tok") if trunk is None else getattr(trunk, "global_pool", None)
            if kind in ("tok", "token"):
                return pos == 0
            return pos >= getattr(trunk, "num_prefix_tokens", 1) if kind == "avg" else None
        kind = self._text("pool_type", "argmax")
        if kind in ("first", "last"):
            return pos == (0 if kind == "first" else columns.shape[1] - 1)
        end = None if columns.tokens is None else self._end_of_text(columns.tokens)
        return None if end is None else pos == end[:, None]

    def _text(self, name: str, default: Any) -> Any:
        """A setting of the text tower, wherever it is kept."""
        text: Any = self._modules.get("text", self.model)
        return getattr(self.model, f"text_{name}", getattr(text, name, default))

    def _end_of_text(self, tokens: Tensor) -> Tensor | None:
        """(batch,) int64, where each text ends, which is where the tower's output is read; None where it is not."""
        kind = self._text("pool_type", "argmax")
        if kind == "argmax":
            return tokens.argmax(-1)
        return (tokens == self._text("eos_id", 2)).int().argmax(-1) if kind == "eos" else None

    def describe(self) -> dict[str, Any]:
        return {"family": self.family, "model_name": type(self.model).__name__, "processing": {}}

    def entry_points(self) -> Iterator[tuple[nn.Module, str]]:
        for name in ("forward", "encode_image", "encode_text"):
            if hasattr(self.model, name):
                yield self.model, name
        for name in ("visual", "text"):
            if isinstance(getattr(self.model, name, None), nn.Module):
                yield getattr(self.model, name), "forward"

    def run(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return self.model(**batch)
        if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
            batch = batch[0]  # a loader's (images, labels)
        model: Any = self.model
        if is_tokens(batch):
            return model.encode_text(batch) if hasattr(model, "encode_text") else model(batch)
        if isinstance(batch, Tensor) and batch.dim() == 4:
            return model.encode_image(batch) if hasattr(model, "encode_image") else model(batch)
        got = f"a tensor of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise SiteError(f"a CLIP runs on images (batch, 3, height, width) or token ids (batch, pos), got {got}")

    def tower(self, site: Site) -> str | None:
        return self._tower_of(self._modules.name_of(site.module))

    @cached_property
    def _alone(self) -> str | None:
        """Which tower the model is, when it is one tower by itself."""
        if hasattr(self.model, "visual"):
            return None
        return "text" if hasattr(self.model, "token_embedding") else "visual"

    @cached_property
    def _towers(self) -> dict[str, nn.Module]:
        """tower -> the module whose call begins its forward pass"""
        if self._alone:
            return {self._alone: self.model}
        begins = {"visual": ("visual",), "text": ("text", "token_embedding")}
        found = {tower: next((one for one in names if one in self._modules), "") for tower, names in begins.items()}
        return {tower: self._modules[name] for tower, name in found.items() if name}

    @cached_property
    def _stacks(self) -> dict[str, tuple[str, tuple[nn.Module, ...]]]:
        """start of a friendly name -> (path of the tower's blocks, the blocks)"""
        wanted = {"": STACKS["text"]} if self._alone else {f"{tower}.": paths for tower, paths in STACKS.items()}
        found = {}
        for start, paths in wanted.items():
            path = next((one for one in paths if one in self._modules), None)
            if path is not None:
                found[start] = (path, tuple(self._modules[f"{path}.{i}"] for i in self._modules[path]._modules))
        return found

    @cached_property
    def _friendly(self) -> dict[str, _Place]:
        """friendly name -> place"""
        places = {}
        for start, (path, blocks) in self._stacks.items():
            for i, block in enumerate(blocks):
                name = f"{start}blocks.{i}.hook_"
                places[f"{name}resid_pre"] = _Place(f"{path}.{i}", block, "in")
                for hook, chain in (("attn_out", ATTN_CHAIN), ("mlp_out", MLP_CHAIN)):
                    last = _last_working(block, chain)
                    if last is not None:
                        within = f"{path}.{i}.{last}"
                        places[f"{name}{hook}"] = _Place(within, self._modules[within], "out")
                places[f"{name}resid_post"] = _Place(f"{path}.{i}", block, "out")
        return places

    @cached_property
    def _friendly_names(self) -> dict[tuple[int, str], str]:
        return {(id(place.module), place.slot): name for name, place in self._friendly.items()}

    def _refuse_unknown(self, name: str, found: str | None) -> None:
        if name.replace("_mid", "_post") in self._friendly:
            raise SiteError(
                f"site '{name}' cannot be hooked: a CLIP block adds its attention between two lines of one forward; "
                f"take '{name.replace('resid_mid', 'attn_out')}' or '{name.replace('_mid', '_post')}'"
            )
        if found is None:
            called = (path for path in self._modules if path and why_uncalled(path, self._modules) is None)
            raise unknown_site(name, [*self._friendly, *called])
        refuse_uncalled(found, self._modules)

    def _tower_of(self, path: str) -> str | None:
        if self._alone:
            return self._alone
        if path == "visual" or path.startswith("visual."):
            return "visual"
        return "text" if path.split(".")[0] in ("text", "transformer", "token_embedding", "ln_final") else None

    def _block_of(self, path: str) -> nn.Module | None:
        """The block that a module path is, or is inside of."""
        for stack, blocks in self._stacks.values():
            if path.startswith(stack + "."):
                return blocks[int(path[len(stack) + 1 :].split(".")[0])]
        return None

    def _width(self, place: _Place) -> int | None:
        widths = module_widths(place.module)
        own = widths.into if place.slot == "in" else widths.out
        if own is not None:
            return own
        block = self._block_of(place.path)
        # A block, and what it adds to the residual stream, are as wide as its first norm.
        if block is None or (block is not place.module and place.path.rpartition(".")[2] not in ATTN_CHAIN + MLP_CHAIN):
            return self._widths.of(place.path) if place.slot == "out" else None
        norms = (one for one in block.modules() if "norm" in type(one).__name__.lower())
        return next((module_widths(one).out for one in norms), None)

    def _is_batch_first(self, path: str) -> bool:
        """Whether the module at ``path`` sees (batch, token, width); the attention of its block says so."""
        block = self._block_of(path)
        return bool(getattr(getattr(block, "attn", None), "batch_first", True))

    def _note(self, name: str) -> str:
        last = len(self._stacks["visual."][1]) - 1 if "visual." in self._stacks else -1
        return "after it only the pooled token is read" if name == f"visual.blocks.{last}.hook_resid_post" else ""


def _last_working(block: nn.Module, chain: tuple[str, ...]) -> str | None:
    """The last submodule of a chain that changes what passes."""
    there = [(name, getattr(block, name, None)) for name in chain]
    working = [name for name, one in there if isinstance(one, nn.Module) and not isinstance(one, nn.Identity)]
    return working[-1] if working else None
