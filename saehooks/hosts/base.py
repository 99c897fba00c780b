"""What every model family offers: a host that finds sites, and sites that carry hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from saehooks.errors import SiteError, WidthError
from saehooks.hosts.early_stop import stopping
from saehooks.hosts.hooks import Slot, hook_module
from saehooks.hosts.layout import ActivationView, first_tensor, with_first_tensor
from saehooks.hosts.method_wrapper import replaced_method
from saehooks.hosts.sequences import Columns, SequenceWatch, ancestors

HookFn = Callable[[Tensor], "Tensor | None"]


class Handle(Protocol):
    """Something registered, that can be taken away again."""

    def remove(self) -> None: ...


class ForwardCall(NamedTuple):
    """What is known when a forward pass begins."""

    tokens: Tensor | None
    """(batch, pos) int64, the tokens of this call alone; None for images and for embeddings."""
    start: int = 0
    """Absolute position of the first column: the number of positions already in the KV cache."""
    attention_mask: Tensor | None = None
    """(batch, start + pos) as the model was given it, 0 where a token is padding; None if it was not given one."""
    tower: str | None = None
    """``"visual"`` or ``"text"`` in a CLIP, None elsewhere."""


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
    """A bridge passes by some points that nobody listens to: there is somebody who listens to forward passes."""

    def heard(dir: str = "both", *args: Any, **kwargs: Any) -> bool:
        return dir != "bwd" or has_hooks(dir, *args, **kwargs)

    return heard


class Host(ABC):
    """One model, seen as a set of sites and a stream of forward passes."""

    family: str
    """``"transformer_lens"``, ``"open_clip"`` or ``"module"``."""

    def __init__(self, model: nn.Module, prefix: str = ""):
        self.model = model
        self.prefix = prefix
        """What paths begin with that are seen from a wrapper around the model."""

    def without_prefix(self, name: str) -> str:
        """The name of a site as it is inside the wrappers of the model."""
        return name[len(self.prefix) :] if self.prefix and name.startswith(self.prefix) else name

    @abstractmethod
    def site(self, name: str, head: int | None = None) -> Site:
        """Find the site called ``name``.

        Args:
            name: any name or alias that ``list()`` shows.
            head: at a site with one vector per attention head, the head to show alone.
        Raises:
            SiteError: no such site, or one that can never fire as the model is set up; says what to write instead.
        """

    @abstractmethod
    def list(self) -> list[SiteInfo]:
        """Every site an SAE can be attached to, in the order of the model."""

    def around(self, sites: Iterable[Site]) -> Sequence[nn.Module]:
        """The modules whose calls tell which text passes some sites: all that hold one of them, outermost first."""
        found = [one for site in sites for one in ancestors([self.model], site.module)]
        return list({id(one): one for one in found}.values())

    def watching(self, watch: SequenceWatch) -> AbstractContextManager[None]:
        """Tell a watch, inside the block, of calls that no module's hook sees."""
        return nullcontext()

    def padding(self, module: nn.Module, tokens: Tensor) -> Tensor | None:
        """(batch, pos) bool, False at padding that the model itself knows, of a call of ``module`` without a mask."""
        return None

    def pooled(self, site: Site, columns: Columns) -> Tensor | None:
        """(pos,) or (batch, pos) bool: what the output of a CLIP's tower is read from; None where nobody says."""
        return None

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What an SAE should remember of the model it was trained on: family, model_name, processing."""

    @abstractmethod
    def entry_points(self) -> Iterator[tuple[nn.Module, str]]:
        """The (module, method name) pairs by which users start a forward pass."""

    @abstractmethod
    def run(self, batch: Any) -> Any:
        """Run one forward pass on a batch, with the cheapest output. The gradient mode is the caller's."""

    @property
    def device(self) -> torch.device:
        """Where the model's parameters live."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def to_device(self, batch: Any) -> Any:
        """A batch with its tensors, also those in dicts, lists and tuples, on the model's device."""
        if isinstance(batch, Tensor):
            return batch.to(self.device, non_blocking=True)
        if isinstance(batch, Mapping):
            return {name: self.to_device(value) for name, value in batch.items()}
        if type(batch) in (list, tuple):
            return type(batch)(self.to_device(value) for value in batch)
        return batch

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that came with the model, or None."""
        return getattr(self.model, "tokenizer", None)

    def tower(self, site: Site) -> str | None:
        """Which tower of a CLIP a site is in: ``"visual"``, ``"text"``, or None elsewhere."""
        return None

    def stop_at(self, site: Site) -> AbstractContextManager[None]:
        """End every forward pass inside the block right after ``site`` has fired.

        All hooks at the site run, later layers do not, and the call of the model returns None. A pass that does
        not reach the site runs to its end.
        """
        return stopping(site.module, site.slot, tuple(self.entry_points()))


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


def is_tokens(value: Any) -> bool:
    """Whether a value looks like token ids: an integer tensor of shape (batch, pos)."""
    return (
        isinstance(value, Tensor)
        and value.dim() == 2
        and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    )
