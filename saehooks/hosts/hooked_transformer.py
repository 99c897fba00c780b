"""Watching the methods of a TransformerLens model, which are entered past the hooks of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from inspect import isgenerator
from typing import Any

import torch
from torch import Tensor, nn

from saehooks.hosts.calls import Given, parameter_names, read_call
from saehooks.hosts.hooks import hook_module
from saehooks.hosts.method_wrapper import replaced_method
from saehooks.hosts.sequences import Generation, SequenceWatch

GENERATE = ("generate", "generate_stream")


@contextmanager
def watching_methods(model: Any, watch: SequenceWatch) -> Iterator[None]:
    """Tell a watch of calls of ``forward`` and ``generate``, by whichever way they are entered.

    ``run_with_hooks`` calls ``forward`` past every module hook. A list of texts is padded inside ``forward``, whose
    inner model may see no mask of it. A HookedTransformer's ``generate`` embeds by itself and hands ``forward`` a
    residual stream: its tokens are gathered from the embedding.
    """
    calls = _Methods(model, watch)
    with ExitStack() as stack:
        stack.enter_context(replaced_method(model, "forward", calls.around_forward))
        for name in GENERATE:
            if callable(getattr(type(model), name, None)):
                watch.knows_generator(model, name)
                stack.enter_context(replaced_method(model, name, calls.around_generate))
        if not hasattr(model, "original_model") and isinstance(getattr(model, "embed", None), nn.Module):
            stack.callback(hook_module(model.embed, "in", calls.embedding).remove)
        yield


class _Methods:
    def __init__(self, model: Any, watch: SequenceWatch):
        self.model, self.watch = model, watch

    def around_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        names = parameter_names(forward)

        @wraps(forward)
        def watched_forward(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            call, more = self._call(given)
            with self.watch.calling(self.model, call, **more):
                return forward(*args, **kwargs)

        return watched_forward

    def around_generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        names = parameter_names(generate)

        @wraps(generate)
        def watched_generate(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            prompt = given.get("input")
            columns = prompt.shape[1] if isinstance(prompt, Tensor) and prompt.dim() > 1 else None
            padding = self._padding(given, "left") if hasattr(self.model, "original_model") else self._padding(given)
            with self.watch.generating(self.model, columns) as generation:
                generation.padding = padding
                output = generate(*args, **kwargs)
            return self._streaming(generation, output) if isgenerator(output) else output

        return watched_generate

    def _streaming(self, generation: Generation, output: Iterator[Any]) -> Iterator[Any]:
        """The steps of a generation that is read bit by bit: between two of them it does not run."""
        while True:
            with self.watch.going_on(generation):
                try:
                    step = next(output)
                except StopIteration:
                    return
            yield step

    def embedding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Gather the tokens that a HookedTransformer's ``generate`` embeds."""
        generation = self.watch.generation
        if generation is not None and generation.module is self.model and not self.watch.is_inside_a_call:
            generation.embedded += [one for one in args[:1] if isinstance(one, Tensor)]

    def _call(self, given: dict[str, Any]) -> tuple[Given, dict[str, Any]]:
        """What a call of ``forward`` is given, with the tokens behind a text or a residual stream."""
        named = {name: value for name, value in given.items() if name not in ("input", "tokens")}
        value = given.get("input")
        if isinstance(value, (str, list)):
            return self._of_texts(given, named)
        if isinstance(value, Tensor) and value.dim() == 1 and not value.is_floating_point():
            value = value[None]
        call = read_call(self.model, [], (), {"input_ids": value, **named} if isinstance(value, Tensor) else named)
        more: dict[str, Any] = {}
        if call.tokens is None and call.shape is not None:
            tokens = given.get("tokens")
            call = call._replace(tokens=tokens if isinstance(tokens, Tensor) else self._gathered(call.shape))
        generation = self.watch.generation
        if call.mask is None and call.tokens is not None and generation is not None and generation.padding is not None:
            more["mask"] = generation.padding(call.tokens)
        return call, more

    def _of_texts(self, given: dict[str, Any], named: dict[str, Any]) -> tuple[Given, dict[str, Any]]:
        if hasattr(self.model, "original_model"):  # which is called with the tokens
            return read_call(self.model, [], (), {}), {"padding": self._padding(given)}
        options = {name: given[name] for name in ("prepend_bos", "padding_side") if name in given}
        tokens = self.model.to_tokens(given["input"], **options)
        padding = self._padding(given)
        call = read_call(self.model, [], (), {"input_ids": tokens, **named})
        return call, {} if padding is None or call.mask is not None else {"mask": padding(tokens)}

    def _gathered(self, shape: tuple[int, int]) -> Tensor | None:
        """The tokens behind a residual stream, gathered while generating: the last ones."""
        generation = self.watch.generation
        if generation is None or not generation.embedded:
            return None
        tokens = torch.cat(generation.embedded, 1)
        return tokens[:, -shape[1] :] if tokens.shape[1] >= shape[1] and len(tokens) == shape[0] else None

    def _padding(self, given: dict[str, Any], side: str | None = None) -> Callable[[Tensor], Tensor | None] | None:
        """Which columns of several texts are text, once they are tokens; None for one text, or none.

        Args:
            side: on which they are padded, whatever is asked for.
        """
        texts, model = given.get("input"), self.model
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(one, str) for one in texts):
            return None
        bos = {"prepend_bos": given["prepend_bos"]} if "prepend_bos" in given else {}
        asked = given.get("padding_side")
        side = side or (asked if isinstance(asked, str) else getattr(model.tokenizer, "padding_side", "right"))
        cut = {} if "max_new_tokens" not in given else {"truncate": False}
        lengths = torch.tensor([[model.to_tokens(one, **bos, **cut).shape[-1]] for one in texts])
        width = int(lengths.max())

        def padding(tokens: Tensor) -> Tensor | None:
            if len(tokens) != len(texts) or tokens.shape[1] < width:
                return None
            column = torch.arange(tokens.shape[1])  # what is generated is text
            real = column >= width - lengths if side == "left" else (column < lengths) | (column >= width)
            return real.to(tokens.device)

        return padding
