"""Watching a HookedTransformer (TransformerLens 2 and 3) begin its forward passes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

from torch import nn

from saehooks.sites.base import ForwardCall, Handle, is_tokens
from saehooks.sites.module import cached_positions
from saehooks.sites.stop import replaced_method


class _HookedWatch:
    """``run_with_hooks`` calls ``forward`` past every module hook, so the method itself is watched.

    Text is not yet tokens when ``forward`` begins, so the call is announced by the embedding, which sees them.
    """

    def __init__(self, model: Any, fn: Callable[[ForwardCall], None]):
        self._fn = fn
        self._start = 0
        self._mask: Any = None
        self._stack = ExitStack()
        self._stack.enter_context(replaced_method(model, "forward", self._around))
        self._stack.callback(model.embed.register_forward_pre_hook(self._embedding).remove)

    def remove(self) -> None:
        self._stack.close()

    def _around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def watched_forward(*args: Any, **kwargs: Any) -> Any:
            self._start = cached_positions(kwargs.get("past_kv_cache"))
            self._mask = kwargs.get("attention_mask")
            if kwargs.get("start_at_layer") is not None:
                tokens = kwargs.get("tokens")
                self._fn(ForwardCall(tokens if is_tokens(tokens) else None, self._start, self._mask))
            return forward(*args, **kwargs)

        return watched_forward

    def _embedding(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        tokens = args[0] if args else None
        self._fn(ForwardCall(tokens if is_tokens(tokens) else None, self._start, self._mask))


def watch_hooked(model: Any, fn: Callable[[ForwardCall], None]) -> Handle:
    """Call ``fn`` when a forward pass of a HookedTransformer begins."""
    return _HookedWatch(model, fn)
