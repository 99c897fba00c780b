"""Modules that wrap a model and pass calls on to it: a site has the same name inside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from saehooks.errors import SiteError


def wrapped(module: nn.Module) -> nn.Module | None:
    """The one module that ``module`` passes its calls on to; None if it is no such wrapper.

    Known are ``torch.compile``'s OptimizedModule, FSDP and checkpoint wrappers, PEFT's models, and every class that has
    no parameters of its own and one child called ``module``, as DataParallel and DistributedDataParallel have.

    >>> model = nn.Linear(2, 3)
    >>> wrapped(nn.DataParallel(model)) is model, wrapped(nn.Sequential(model))
    (True, None)
    """
    children = module._modules
    for name in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        if name in children:
            return children[name]
    if hasattr(module, "peft_config") and not hasattr(type(module), "base_model_prefix"):  # which PEFT marks too
        return children.get("base_model") or children.get("model")
    only_child = len(children) == 1 and not module._parameters
    return children.get("module") if only_child else None


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The model inside all wrappers, and what its paths begin with when seen from the outermost one.

    Raises:
        SiteError: the model, or a wrapper of it, cannot carry hooks.

    >>> model = nn.Linear(2, 3)
    >>> unwrapped(nn.DataParallel(model)) == (model, "module.")
    True
    """
    prefix = ""
    while True:
        refuse_unhookable(model, "this model")
        inside = wrapped(model)
        if inside is None:
            return model, prefix
        prefix += next(name for name, child in model._modules.items() if child is inside) + "."
        model = inside


def refuse_unhookable(module: nn.Module, what: str) -> None:
    """Refuse a module whose submodules run where no hook sees them.

    Raises:
        SiteError: says what to attach to instead.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise SiteError(
            f"{what} is a TorchScript module (made by torch.jit.script or torch.jit.trace), whose parts run without "
            "Python hooks; attach to the nn.Module that it was made from"
        )
    if isinstance(module, nn.DataParallel) and len(module.device_ids or ()) > 1:
        raise SiteError(
            f"{what} is an nn.DataParallel over {len(module.device_ids)} devices, which runs copies of the model side "
            "by side, each on a part of the batch; call its .module, or use DistributedDataParallel"
        )


class ModuleNames(Mapping[str, nn.Module]):
    """The modules of a model by the name they have without wrappers.

    >>> names = ModuleNames(nn.Sequential(nn.DataParallel(nn.Sequential(nn.Linear(2, 3)))))
    >>> list(names), names.path_of(names["0.0"]), names.find("0.module.0")
    (['', '0', '0.0'], '0.module.0', '0.0')
    """

    def __init__(self, model: nn.Module):
        names: dict[str, str] = {}  # path -> name
        self._modules: dict[str, nn.Module] = {}
        self._paths: dict[str, nn.Module] = {}
        self._names: dict[int, tuple[str, str]] = {}  # module -> name, path
        scripted: list[str] = []
        for path, module in model.named_modules():
            before, _, last = path.rpartition(".")
            parent = names.get(before)
            if path and parent is not None and wrapped(self._paths[before]) is module:
                names[path] = parent
            else:
                names[path] = f"{parent}.{last}" if parent else last
            self._paths[path] = module
            self._modules[names[path]] = module
            self._names[id(module)] = names[path], path
            if isinstance(module, torch.jit.ScriptModule) and not any(path.startswith(f"{one}.") for one in scripted):
                scripted.append(path)
        self._scripted = tuple(scripted)

    def __getitem__(self, name: str) -> nn.Module:
        return self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def name_of(self, module: nn.Module) -> str:
        """The name of a module, without wrappers."""
        return self._names[id(module)][0]

    def path_of(self, module: nn.Module) -> str:
        """The path of a module in the model, wrappers included."""
        return self._names[id(module)][1]

    def is_scripted(self, module: nn.Module) -> bool:
        """Whether a module is inside of a TorchScript module, where no hook is run."""
        path = self.path_of(module)
        return any(path.startswith(f"{one}.") for one in self._scripted)

    def find(self, name: str) -> str | None:
        """The name of the module that is meant: by its name, its path, or its name inside a class of the user's.

        Inside a class around a model, a name of the model's own counts if it means one module only.
        """
        if name in self._modules:
            return name
        if name in self._paths:
            return self.name_of(self._paths[name])
        start = ""
        while len(children := [one for one in self._modules if re.fullmatch(re.escape(start) + r"[^.]+", one)]) == 1:
            start = children[0] + "."
            if start + name in self._modules:
                return start + name
        if hasattr(self._modules[""], "config") or name.split(".")[0].isdigit():
            return None  # a model of its own, whose names are whole
        ends = [one for one in self._modules if one.endswith(f".{name}")]
        return ends[0] if len(ends) == 1 else None
