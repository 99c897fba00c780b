"""A site: one place in a model, through which activations flow and where a hook can be put."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from saehooks.errors import SiteError, WidthError
from saehooks.hosts.hooks import Slot, hook_module
from saehooks.hosts.layout import ActivationView, first_tensor, with_first_tensor
from saehooks.hosts.method_wrapper import replaced_method

HookFn = Callable[[Tensor], "Tensor | None"]


class Handle(Protocol):
    """A registration that can be removed."""

    def remove(self) -> None: ...


class SiteInfo(NamedTuple):
    """One place where an SAE can be attached."""

    name: str
    """The name to write as ``at=``."""
    aliases: tuple[str, ...]
    """Other names of the same place."""
    width: int | None
    """The ``d_in`` an SAE needs there; None where only a forward pass can tell."""
    shape: str
    """The axes of an activation, such as ``batch pos d_model``."""
    note: str = ""
    """What to know before attaching, such as the flag that switches the site on."""


class _Entered:
    """What was entered together, as one handle."""

    def __init__(self, stack: ExitStack):
        self._stack = stack

    def remove(self) -> None:
        self._stack.close()


@dataclass(frozen=True, eq=False)
class Site:
    """One place in one model, through which activations of shape (batch, pos, width) flow.

    Two sites are the same place when their ``key`` is equal, whatever names they were asked by.
    """

    name: str
    """The portable name, such as ``blocks.8.hook_resid_pre``."""
    requested_name: str
    """The name it was asked by."""
    module: nn.Module = field(repr=False)
    """The module whose output, or input, is the site."""
    width: int | None
    """Size of the last axis that a hook sees; None where only a forward pass can tell."""
    slot: Slot = "out"
    """``"out"`` for the module's output, ``"in"`` for its input."""
    head: int | None = None
    """The one attention head that is shown, or None for all of them joined."""
    aliases: tuple[str, ...] = ()
    """Every other name of this place."""
    note: str = ""
    """What to know before writing here; the same as in the table of sites."""
    view: ActivationView = field(default_factory=ActivationView, repr=False)
    """How the raw activation becomes the (batch, pos, width) that users know."""

    def of_width(self, d_in: int) -> Site:
        """The same site for an SAE of width ``d_in``, where only a forward pass can tell how wide the site is."""
        if self.width is not None or self.head is not None:
            return self
        return replace(self, width=d_in, view=replace(self.view, width=d_in))

    @property
    def key(self) -> Hashable:
        """Identity of the place: equal for an alias and its canonical name, different for two heads."""
        return id(self.module), self.slot, self.head

    def hook(self, fn: HookFn) -> Handle:
        """Call ``fn`` on each activation that passes here.

        Args:
            fn: takes acts of shape (batch, pos, width) in the model's dtype. It returns a tensor of the same shape
                to put in their place (any dtype and device: they are cast back), or None to leave the very same
                tensor flowing. It must not write into acts.
        Returns:
            A handle; its ``remove()`` leaves every hook of the module as it was.
        Raises:
            WidthError: at the forward pass, when what passes here is not (batch, pos, width), or what ``fn``
                returned has another shape.
        """
        hook = self._pre_hook(fn) if self.slot == "in" else self._post_hook(fn)
        with ExitStack() as stack:
            if callable(getattr(type(self.module), "has_hooks", None)):
                stack.enter_context(replaced_method(self.module, "has_hooks", _with_listener))
            stack.callback(hook_module(self.module, self.slot, hook).remove)
            return _Entered(stack.pop_all())

    def _post_hook(self, fn: HookFn) -> Callable[..., Any]:
        def post_hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            replaced = self._apply(fn, first_tensor(output, self.name))
            return None if replaced is None else with_first_tensor(output, replaced)

        return post_hook

    def _pre_hook(self, fn: HookFn) -> Callable[..., Any]:
        def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            holder: Any = args if args else kwargs
            replaced = self._apply(fn, first_tensor(holder, self.name))
            if replaced is None:
                return None
            changed = with_first_tensor(holder, replaced)
            return (changed, kwargs) if args else (args, changed)

        return pre_hook

    def _apply(self, fn: HookFn, raw: Tensor) -> Tensor | None:
        """Run ``fn`` on the user's view of ``raw``; the raw tensor to put in its place, or None for no change."""
        try:
            acts = self.view.read(raw)
        except WidthError as error:
            raise WidthError(f"site '{self.name}': {error}") from None
        if acts.dim() == 3 and self.width not in (None, acts.shape[-1]):
            raise WidthError(f"an SAE there has d_in={self.width}, but '{self.name}' is {acts.shape[-1]} wide")
        if acts.dim() != 3:
            expected = "width" if self.width is None else self.width
            raise WidthError(
                f"site '{self.name}' carries activations of shape {tuple(acts.shape)}; "
                f"an SAE needs (batch, pos, {expected}) there"
            )
        new = fn(acts)
        if new is None or new is acts:
            return None
        if not isinstance(new, Tensor) or new.shape != acts.shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise WidthError(f"a hook at '{self.name}' returned {got}, but must return {tuple(acts.shape)} or None")
        return self.view.write(new.to(dtype=raw.dtype, device=raw.device), raw)


def _with_listener(has_hooks: Callable[..., bool]) -> Callable[..., bool]:
    """Make a bridge run a hook point that it skips while the point has no hooks."""

    def heard(dir: str = "both", *args: Any, **kwargs: Any) -> bool:
        return dir != "bwd" or has_hooks(dir, *args, **kwargs)

    return heard


def check_head(name: str, head: int | None, n_heads: int | None) -> None:
    """Refuse a head that the site does not have.

    Raises:
        SiteError: the site has no heads, or fewer.
    """
    if head is None:
        return
    if n_heads is None:
        raise SiteError(f"site '{name}' has no attention heads: leave out head={head} (heads are at attn.hook_z)")
    if not 0 <= head < n_heads:
        raise SiteError(f"site '{name}' has heads 0 .. {n_heads - 1}, got head={head}")
