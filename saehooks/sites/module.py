"""Any ``nn.Module`` by module path, such as a plain Hugging Face model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from saehooks.errors import SiteError
from saehooks.sites.base import ForwardCall, Handle, Host, Site, SiteInfo, check_head, is_tokens
from saehooks.sites.layout import View
from saehooks.sites.names import unknown_site
from saehooks.sites.widths import config_width, module_widths


class ModuleHost(Host):
    """A model whose sites are the outputs of its submodules.

    >>> host = ModuleHost(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)))
    >>> [(info.name, info.width) for info in host.list()]
    [('0', 5), ('1', 2)]
    """

    family = "module"

    def site(self, name: str, head: int | None = None) -> Site:
        modules = dict(self.model.named_modules())
        if name not in modules or not name:
            raise unknown_site(name, [one for one in modules if one])
        refuse_unfired(name, modules)
        check_head(name, head, None)
        return Site(name=name, given=name, module=modules[name], width=self._width(modules[name]), view=View())

    def list(self) -> list[SiteInfo]:
        modules = dict(self.model.named_modules())
        infos = []
        for name, module in modules.items():
            width = self._width(module)
            if name and width is not None and not is_fused(name, modules):
                infos.append(SiteInfo(name, (), width, "batch pos width"))
        return infos

    def watch(self, fn: Callable[[ForwardCall], None]) -> Handle:
        return watch_module(self.model, fn)

    def describe(self) -> dict[str, Any]:
        config = getattr(self.model, "config", None)
        name = getattr(config, "_name_or_path", "") or type(self.model).__name__
        return {"family": self.family, "model_name": name, "processing": {}}

    def entry_points(self) -> Iterator[tuple[nn.Module, str]]:
        yield self.model, "forward"

    def run(self, batch: Any) -> Any:
        cheap = {"use_cache": False, "logits_to_keep": 1}
        known = inspect.signature(self.model.forward).parameters
        kwargs = {name: value for name, value in cheap.items() if name in known}
        if isinstance(batch, dict):
            return self.model(**{**kwargs, **batch})
        return self.model(batch, **kwargs)

    def _width(self, module: nn.Module) -> int | None:
        """The width of a module's output: a leaf tells it, a block of a known model has the residual width."""
        out = module_widths(module).out
        if out is not None:
            return out
        residual = config_width(getattr(self.model, "config", None))
        leaves = [one for one in module.modules() if module_widths(one).out is not None]
        linear = [one for one in leaves if module_widths(one).into != module_widths(one).out or _is_square(one)]
        if residual is None or not linear:
            return None
        return residual if module_widths(linear[-1]).out == residual else None


def _is_square(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return getattr(weight, "ndim", 0) == 2


def is_fused(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a module is one that its parent reads the weights of and never calls."""
    parent, _, last = name.rpartition(".")
    return last == "out_proj" and isinstance(modules.get(parent), nn.MultiheadAttention)


def refuse_unfired(name: str, modules: dict[str, nn.Module]) -> None:
    """Refuse a module that is never called.

    Raises:
        SiteError: names the module to take instead.
    """
    if is_fused(name, modules):
        parent = name.rpartition(".")[0]
        raise SiteError(
            f"site '{name}' never fires: nn.MultiheadAttention uses its weights without calling it; "
            f"take '{parent}', its output"
        )
    if isinstance(modules[name], (nn.ModuleList, nn.ModuleDict)):
        raise SiteError(f"site '{name}' is a container that is never called; take one of its members, '{name}.0'")


def watch_module(model: nn.Module, fn: Callable[[ForwardCall], None]) -> Handle:
    """Call ``fn`` when ``model`` is called in the Hugging Face way: tokens, attention_mask, past_key_values."""

    def announce(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        fn(forward_call(module, args, kwargs))

    return model.register_forward_pre_hook(announce, with_kwargs=True)


def forward_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardCall:
    """Read tokens and their first absolute position from the arguments of a call."""
    if len(args) > 1:
        names = list(inspect.signature(module.forward).parameters)
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    tokens = kwargs.get("input_ids", args[0] if args else None)
    mask = kwargs.get("attention_mask")
    return ForwardCall(
        tokens=tokens if is_tokens(tokens) else None,
        start=cached_positions(kwargs.get("past_key_values")),
        attention_mask=mask if isinstance(mask, Tensor) and mask.dim() == 2 else None,
    )


def cached_positions(cache: Any) -> int:
    """How many positions a KV cache already holds: Hugging Face's, old or new, or TransformerLens's."""
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    layers = getattr(cache, "entries", cache)
    if not layers:
        return 0
    keys = getattr(layers[0], "past_keys", None)
    return int(layers[0][0].shape[-2]) if keys is None else int(keys.shape[1])
