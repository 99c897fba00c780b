"""Hooks that belong to a block: copies of the model do not have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from saehooks.hosts.copied import after_copying

Slot = Literal["in", "out"]

TABLES: dict[str, tuple[str, ...]] = {
    "in": ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    "out": ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}
"""Where torch keeps hooks of each slot: the hooks first, then what is known about them, under the same keys."""


ARGUMENTS = {"in": 2, "out": 3}
"""How many arguments a hook of each slot gets beside its module: args, kwargs, output."""


class BlockHook:
    """One hook of one block on one module; in a copy of the module it is gone."""

    def __init__(self, module: nn.Module, slot: Slot, fn: Callable[..., Any], first: bool):
        self._module, self._slot, self._fn = module, slot, fn
        if slot == "in":
            self._handle = module.register_forward_pre_hook(self, with_kwargs=True, prepend=first)
        else:
            self._handle = module.register_forward_hook(self, with_kwargs=True, prepend=first)

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        # In a forward of another thread, while the hook comes or goes, torch may not know that it takes keywords.
        return self._fn(module, *args) if len(args) == ARGUMENTS[self._slot] else None

    def remove(self) -> None:
        self._handle.remove()

    def move_to_end(self) -> None:
        """Run after every other hook of the module that is there now."""
        hooks: Any = getattr(self._module, TABLES[self._slot][0])
        if self._handle.id in hooks:
            hooks.move_to_end(self._handle.id)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Gone:
        gone, copied = _Gone(self._slot), memo.get(id(self._module))
        if copied is not None:
            after_copying(memo, lambda: gone.leave(copied))
        return gone

    def __reduce__(self) -> tuple[Any, ...]:
        return _Gone, (self._slot,)


class _Gone:
    """What a copy holds of a block's hook until it is taken away, at the latest when the copy is called."""

    def __init__(self, slot: Slot):
        self._slot = slot

    def __call__(self, module: nn.Module, *args: Any) -> None:
        self.leave(module)

    def leave(self, module: nn.Module) -> None:
        """Go from the tables of the module whose hook this is."""
        hooks, *about = (getattr(module, table) for table in TABLES[self._slot])
        for key in [key for key, hook in hooks.items() if hook is self]:
            for table in (hooks, *about):
                table.pop(key, None)


def hook_module(module: nn.Module, slot: Slot, fn: Callable[..., Any], *, first: bool = False) -> BlockHook:
    """Register a hook for the length of a block.

    Args:
        module: the module to hook.
        slot: ``"in"`` calls ``fn(module, args, kwargs)`` before the module runs, and takes ``(args, kwargs)`` or None
            from it; ``"out"`` calls ``fn(module, args, kwargs, output)`` after it, and takes an output or None.
        first: run before the hooks that are there already, instead of after them.
    Returns:
        A handle; its ``remove()`` leaves every other hook of the module as it was.
    """
    return BlockHook(module, slot, fn, first)
