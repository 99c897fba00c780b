"""Watching a HookedTransformer (TransformerLens 2 and 3) begin its forward passes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from saehooks.hosts.base import ForwardCall, Handle, is_tokens
from saehooks.hosts.early_stop import replaced_method
from saehooks.hosts.hooks import hook_module
from saehooks.hosts.module import cached_positions


class _HookedWatch:
    """Watches the methods ``forward`` and ``generate``, and the embedding.

    ``run_with_hooks`` calls ``forward`` past every module hook, so the method itself is watched. Text is not yet
    tokens when ``forward`` begins, so the call is announced by the embedding, which sees them. ``generate`` embeds
    by itself and hands ``forward`` a residual stream: its tokens are gathered from the embedding.
    """

    def __init__(self, model: Any, fn: Callable[[ForwardCall], None]):
        self._fn = fn
        self._call: ForwardCall | None = None
        self._generated: list[Tensor] | None = None
        with ExitStack() as stack:
            stack.enter_context(replaced_method(model, "forward", self._around_forward))
            if hasattr(model, "generate"):
                stack.enter_context(replaced_method(model, "generate", self._around_generate))
            stack.callback(hook_module(model.embed, "in", self._embedding).remove)
            self._stack = stack.pop_all()

    def remove(self) -> None:
        self._stack.close()

    def _around_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(forward).parameters)

        @wraps(forward)
        def watched_forward(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            call = ForwardCall(None, cached_positions(given.get("past_kv_cache")), given.get("attention_mask"))
            if given.get("start_at_layer") is not None:
                self._fn(call._replace(tokens=self._tokens(given, call.start)))
                return forward(*args, **kwargs)
            self._call = call
            try:
                return forward(*args, **kwargs)
            finally:
                self._call = None

        return watched_forward

    def _around_generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(generate)
        def watched_generate(*args: Any, **kwargs: Any) -> Any:
            self._generated = []
            try:
                return generate(*args, **kwargs)
            finally:
                self._generated = None

        return watched_generate

    def _embedding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args and is_tokens(args[0]) else None
        if self._call is not None:
            call, self._call = self._call, None
            self._fn(call._replace(tokens=tokens))
        elif self._generated is not None and tokens is not None:
            self._generated.append(tokens)

    def _tokens(self, given: dict[str, Any], start: int) -> Tensor | None:
        """The tokens behind a residual stream: passed along with it, or gathered while generating."""
        if is_tokens(given.get("tokens")):
            return given["tokens"]
        pos = given["input"].shape[1]
        if not self._generated or sum(one.shape[1] for one in self._generated) != start + pos:
            return None
        return torch.cat(self._generated, dim=1)[:, start:]


def watch_hooked(model: Any, fn: Callable[[ForwardCall], None]) -> Handle:
    """Call ``fn`` when a forward pass of a HookedTransformer begins."""
    return _HookedWatch(model, fn)
