"""What is compared between a clean, a spliced and a zero-ablated run: the interface, and the language models' one."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saehooks.errors import ConfigError
from saehooks.hosts import ForwardCall, Host
from saehooks.hosts.caches import find_cache

ROWS_AT_ONCE = 256
"""Rows of logits turned into log-probabilities at a time, so that memory stays at rows x vocabulary."""


class Call(NamedTuple):
    """One call of the model by the user."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Comparison(ABC):
    """Compares the outputs of three runs, and keeps sums of the comparison."""

    @abstractmethod
    def entry_points(self) -> Iterable[tuple[nn.Module, str]]:
        """The (module, method name) pairs whose calls are measured."""

    @abstractmethod
    def check(self, call: Call) -> None:
        """Refuse a call that cannot be measured, before anything runs."""

    @abstractmethod
    def rerun(self, call: Call) -> Tensor:
        """Run the call again, and return the output that is compared."""

    @abstractmethod
    def read(self, call: Call, output: Any) -> Tensor | None:
        """The output that is compared, out of what the user's own call returned; None if it does not hold it."""

    @abstractmethod
    def add(self, began: ForwardCall, clean: Tensor, spliced: Tensor, zero: Tensor) -> None:
        """Compare, and add to the sums."""

    @abstractmethod
    def summary(self) -> dict[str, float]:
        """The figures so far."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """Table rows with the columns clean, spliced, zero-ablated."""

    @abstractmethod
    def figures(self) -> dict[str, Any]:
        """The other figures, by the name a reader sees."""

    @abstractmethod
    def how_to_call(self) -> str:
        """What to write so that something is measured."""


class LanguageModelComparison(Comparison):
    """Cross-entropy of the next token and KL divergence, in nats, weighted by predicted tokens."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._sums = torch.zeros(4, dtype=torch.float64)  # CE clean, CE spliced, CE zero, KL
        self._predictions = 0

    def entry_points(self) -> Iterable[tuple[nn.Module, str]]:
        return self.host.entry_points()

    def check(self, call: Call) -> None:
        bound = _bound(call)
        options = dict(bound.arguments)
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                options |= options.pop(name, {})
        if any(options.get(name) is not None for name in ("stop_at_layer", "start_at_layer")):
            raise ConfigError("measure needs whole forward passes, from tokens to logits: leave out stop_at_layer=")
        if find_cache(options.items()) is not None:
            raise ConfigError(
                "measure runs each call three times, which a KV cache does not survive: call model(tokens) on whole "
                "sequences, and generate outside the block"
            )

    def rerun(self, call: Call) -> Tensor:
        bound = _bound(call)
        known = inspect.signature(call.forward).parameters
        for name, value in (("return_type", "logits"), ("use_cache", False)):
            if name in known:
                bound.arguments[name] = value
        logits = self._logits(call.forward(*bound.args, **bound.kwargs))
        if logits is None:
            raise ConfigError(
                "no logits of shape (batch, pos, vocabulary) came out of this call, so there is no cross-entropy to "
                "compare: call a language model as model(tokens)"
            )
        return logits

    def read(self, call: Call, output: Any) -> Tensor | None:
        return self._logits(output)

    def _logits(self, output: Any) -> Tensor | None:
        """(batch, pos, vocabulary) out of a tensor, a Hugging Face output or a tuple."""
        found = getattr(output, "logits", output)
        candidates = found if isinstance(found, (tuple, list)) else (found,)
        return next((one for one in candidates if isinstance(one, Tensor) and one.dim() == 3), None)

    def add(self, began: ForwardCall, clean: Tensor, spliced: Tensor, zero: Tensor) -> None:
        tokens = _checked_tokens(began, clean)
        keep = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
        if began.attention_mask is not None:
            real = began.attention_mask.bool().to(tokens.device)
            keep = real[:, 1:] & real[:, :-1]
        targets = tokens[:, 1:][keep]
        runs = [logits[:, :-1][keep.to(logits.device)] for logits in (clean, spliced, zero)]
        for start in range(0, len(targets), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            self._add_rows(targets[part].to(clean.device), *(run[part] for run in runs))
        self._predictions += len(targets)

    def _add_rows(self, targets: Tensor, clean: Tensor, spliced: Tensor, zero: Tensor) -> None:
        """Add rows: targets (n,), logits (n, vocabulary)."""
        log_clean, log_spliced = clean.float().log_softmax(-1), spliced.float().log_softmax(-1)
        sums = [F.nll_loss(log, targets, reduction="sum") for log in (log_clean, log_spliced)]
        sums.append(F.cross_entropy(zero.float(), targets, reduction="sum"))
        sums.append(F.kl_div(log_spliced, log_clean, reduction="sum", log_target=True))
        self._sums += torch.stack(sums).double().cpu()

    def summary(self) -> dict[str, float]:
        clean, spliced, zero, kl = (
            (self._sums / self._predictions).tolist() if self._predictions else [float("nan")] * 4
        )
        lost = zero - clean
        return {
            "ce_clean": clean,
            "ce_spliced": spliced,
            "ce_zero": zero,
            "ce_degradation": spliced - clean,
            "ce_recovered": (zero - spliced) / lost if lost else float("nan"),
            "kl": kl,
            "n_predictions": self._predictions,
        }

    def rows(self) -> list[dict[str, Any]]:
        s = self.summary()
        return [
            {
                "": "cross-entropy (nats)",
                "clean": s["ce_clean"],
                "spliced": s["ce_spliced"],
                "zero-ablated": s["ce_zero"],
            }
        ]

    def figures(self) -> dict[str, Any]:
        s = self.summary()
        return {
            "CE degradation": s["ce_degradation"],
            "CE recovered": f"{s['ce_recovered']:.1%}",
            "KL (clean || spliced)": s["kl"],
            "tokens predicted": s["n_predictions"],
        }

    def how_to_call(self) -> str:
        return "call model(tokens) inside the block"


def _bound(call: Call) -> inspect.BoundArguments:
    """The arguments of a call by name; a wrong call fails here with the model's own words."""
    return inspect.signature(call.forward).bind(*call.args, **call.kwargs)


def _checked_tokens(began: ForwardCall, logits: Tensor) -> Tensor:
    """The (batch, pos) tokens that the logits belong to."""
    if began.tokens is None:
        raise ConfigError("cross-entropy needs token ids, and this call had none: call model(tokens), not embeddings")
    if began.tokens.shape != logits.shape[:2]:
        raise ConfigError(
            f"logits of shape {tuple(logits.shape)} do not belong to tokens of shape {tuple(began.tokens.shape)}: "
            "ask the model for the logits of every position"
        )
    if began.tokens.shape[1] < 2:
        raise ConfigError("cross-entropy needs a next token: give sequences of at least 2 tokens, got 1")
    return began.tokens
