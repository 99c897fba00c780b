"""Where an attachment acts: position masks, absolute also while generating with a KV cache.

``where=`` takes

- ``sh.last``, ``sh.positions([0, 3])``, ``sh.positions(slice(1, None))``, ``sh.not_special(tokenizer)``,
  and ``a & b``, ``a | b``, ``~a`` of them;
- an int, a list of ints or a slice, as ``sh.positions`` takes them;
- a boolean mask of shape (pos,) or (batch, pos);
- a function ``(tokens, codes) -> mask``.

The *prompt* is the first forward of a sequence. A forward belongs to the sequence before it when it
continues its KV cache, or when, without a cache, its tokens are those of the forward before it and one
more column. Negative positions and ``sh.last`` count from the end of the prompt, so that a generation
edits the same places with and without the cache. For images, position 0 is the CLS token. Positions are
columns: in a batch padded on the left, position 0 of a short text is padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saehooks.codes import Codes
from saehooks.errors import WhereError
from saehooks.hosts.base import ForwardCall


@dataclass(frozen=True, eq=False)
class View:
    """What a mask is made from: one forward, as one site sees it."""

    codes: Codes
    """Codes of shape (batch, pos)."""
    tokens: Tensor | None
    """(batch, pos) int64, None where they are not known."""
    start: int
    """Absolute position of the first column: the length of the KV cache."""
    prompt: int
    """Length of the prompt: one more than the last absolute position of the sequence's first forward."""
    last: int | Tensor
    """The prompt's last position; (batch, 1) int64 where an attention mask told rows of different lengths."""
    tokenizer: Any = None
    """The model's own tokenizer, where it has one."""

    @property
    def positions(self) -> Tensor:
        """(pos,) int64, the absolute position of each column."""
        return torch.arange(self.start, self.start + self.codes.shape[1], device=self.codes.indices.device)


class Where:
    """A rule that makes a mask, (pos,) or (batch, pos), for each forward."""

    reach = -1
    """The largest absolute position that is asked for by number: an error on leaving if it never came."""

    def mask(self, view: View) -> Tensor:
        """Bool mask, (pos,) or (batch, pos)."""
        raise TypeError(f"{type(self).__name__} does not say where")

    def __and__(self, other: Any) -> Where:
        return Both(self, as_where(other))

    def __or__(self, other: Any) -> Where:
        return ~(~self & ~as_where(other))

    def __invert__(self) -> Where:
        return Not(self)


@dataclass(frozen=True, eq=False)
class Both(Where):
    """Where two rules both hold."""

    one: Where
    other: Where

    @property
    def reach(self) -> int:  # type: ignore[override]
        return max(self.one.reach, self.other.reach)

    def mask(self, view: View) -> Tensor:
        return self.one.mask(view) & self.other.mask(view)


@dataclass(frozen=True, eq=False)
class Not(Where):
    """Where a rule does not hold."""

    rule: Where

    @property
    def reach(self) -> int:  # type: ignore[override]
        return self.rule.reach

    def mask(self, view: View) -> Tensor:
        return ~self.rule.mask(view)


class Last(Where):
    """The last position of a forward; while generating, the prompt's last and every one after it."""

    def mask(self, view: View) -> Tensor:
        positions = view.positions
        return (positions == view.last) | (positions >= view.prompt)

    def __repr__(self) -> str:
        return "sh.last"


last = Last()
"""The last position of a forward (the last that is not padding, where the model was given an attention mask).

While generating: the position from which each new token is predicted, thus the prompt's last and all after it.
"""


@dataclass(frozen=True, eq=False)
class Positions(Where):
    """Positions listed one by one, negative ones from the end of the prompt."""

    listed: tuple[int, ...]

    @property
    def reach(self) -> int:  # type: ignore[override]
        return max(self.listed, default=-1)

    def mask(self, view: View) -> Tensor:
        low = min(self.listed, default=0)
        if low < -view.prompt:
            raise WhereError(f"position {low} is before the first: this forward has {view.prompt} positions")
        places = [p + view.prompt if p < 0 else p for p in self.listed]
        return torch.isin(view.positions, torch.tensor(places, dtype=torch.int64, device=view.positions.device))


@dataclass(frozen=True, eq=False)
class Span(Where):
    """A slice of positions, negative ends from the end of the prompt; an open end takes in generated positions."""

    span: slice

    def mask(self, view: View) -> Tensor:
        begin, end = (e if e is None or e >= 0 else max(e + view.prompt, 0) for e in (self.span.start, self.span.stop))
        positions, begin, step = view.positions, begin or 0, self.span.step or 1
        inside = (positions >= begin) & ((positions - begin) % step == 0)
        return inside if end is None else inside & (positions < end)

    def __repr__(self) -> str:
        ends = [self.span.start, self.span.stop, *([] if self.span.step is None else [self.span.step])]
        return f"positions [{':'.join('' if end is None else str(end) for end in ends)}]"


@dataclass(frozen=True, eq=False)
class Mask(Where):
    """A given mask over the prompt, (pos,) or (batch, pos); positions generated after it are left alone."""

    given: Tensor

    def mask(self, view: View) -> Tensor:
        batch, columns = view.codes.shape[0], view.positions
        given = self.given.to(columns.device)
        if given.shape[-1] != view.prompt or (given.dim() == 2 and given.shape[0] != batch):
            raise WhereError(
                f"where has shape {tuple(given.shape)}; expected ({view.prompt},) or ({batch}, {view.prompt}), "
                "one column for each position of the forward; a function or a slice fits any length"
            )
        return given[..., columns.clamp(max=view.prompt - 1)] & (columns < view.prompt)


@dataclass(frozen=True, eq=False)
class NotSpecial(Where):
    """Everywhere but on special tokens."""

    source: Any = None

    def mask(self, view: View) -> Tensor:
        if view.tokens is None:
            raise WhereError("not_special needs tokens, and this forward has none (images, or a call with embeddings)")
        source = self.source if self.source is not None else view.tokenizer
        if source is None:
            raise WhereError("this model carries no tokenizer: write sh.not_special(tokenizer)")
        if not hasattr(source, "all_special_ids"):
            source = getattr(source, "tokenizer", source)  # open_clip wraps the tokenizers of transformers
        ids, tokens = getattr(source, "all_special_ids", source), view.tokens
        ordinary = ~torch.isin(tokens, torch.tensor(list(ids), dtype=tokens.dtype, device=tokens.device))
        if hasattr(source, "eot_token_id"):  # CLIP pads with an ordinary token after the end of the text
            ordinary &= (tokens == source.eot_token_id).cumsum(-1) == 0
        return ordinary


@dataclass(frozen=True, eq=False)
class Rule(Where):
    """A function of the user's own: ``(tokens, codes) -> mask``."""

    function: Callable[[Tensor | None, Codes], Any]

    def mask(self, view: View) -> Tensor:
        given, expected = self.function(view.tokens, view.codes), view.codes.shape
        if isinstance(given, Tensor) and given.dtype == torch.bool and given.shape in (expected, expected[-1:]):
            return given
        what = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
        unknown = "; the tokens of this forward are not known (None was passed)" if view.tokens is None else ""
        raise WhereError(
            f"the where-function returned {what}; expected torch.bool of shape {expected} or {expected[-1:]}{unknown}"
        )


def positions(listed: int | Iterable[int] | slice) -> Where:
    """Absolute positions: ``positions([0, 3])``, ``positions(slice(1, None))``, ``positions(-1)``.

    Negative ones count from the end of the prompt, and an open slice takes in generated positions.
    """
    if isinstance(listed, slice):
        if listed.step is not None and listed.step < 1:
            raise WhereError(f"the step of {listed} must be positive")
        return Span(listed)
    if hasattr(listed, "__index__"):
        listed = [listed]  # type: ignore[list-item]
    try:
        return Positions(tuple(p.__index__() for p in listed))  # type: ignore[union-attr]
    except (TypeError, AttributeError):
        raise WhereError(f"positions must be whole numbers or a slice; got {listed!r}") from None


def not_special(tokenizer: Any = None) -> Where:
    """Skip special tokens (BOS, EOS, padding ...), by the tokenizer's ``all_special_ids``.

    Args:
        tokenizer: a tokenizer, or a list of token ids; the model's own tokenizer when left out.
    """
    return NotSpecial(tokenizer)


def as_where(where: Any) -> Where:
    """The rule for anything that ``where=`` takes.

    Raises: WhereError for anything else, or a mask with more than two dimensions.
    """
    if isinstance(where, Where):
        return where
    if isinstance(where, str):
        raise WhereError(
            f"where={where!r} is a text; write where=sh.last, positions as in [1, 2], a slice, a mask or a function"
        )
    if callable(where):
        return _rule(where)
    if hasattr(where, "__array__") or _all_bools(where):
        where = torch.as_tensor(where)
    if isinstance(where, Tensor) and where.dtype == torch.bool:
        if where.dim() not in (1, 2):
            raise WhereError(f"where has shape {tuple(where.shape)}; expected (pos,) or (batch, pos)")
        return Mask(where)
    if isinstance(where, Tensor):
        if where.dim() > 1 or where.is_floating_point():
            raise WhereError(
                f"where is {where.dtype} of shape {tuple(where.shape)}; expected torch.bool of shape (pos,) or "
                "(batch, pos): write mask.bool()"
            )
        where = where.reshape(-1).tolist()
    return positions(where)


def _rule(function: Callable[..., Any]) -> Rule:
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        raise WhereError("a where-function takes two arguments: where=lambda tokens, codes: tokens != bos") from None
    except ValueError:  # a builtin without a signature
        pass
    return Rule(function)


def _all_bools(where: Any) -> bool:
    return isinstance(where, (list, tuple)) and len(where) > 0 and all(isinstance(w, bool) for w in where)


# ----------------------------------------------------------- following forwards


class Cursor:
    """Follows the forwards of one block: absolute positions, and where each sequence's prompt ended."""

    def __init__(self) -> None:
        self.call = ForwardCall(None)
        self.calls = 0
        self.highest = -1
        self._prompt: int | None = None  # known at the first site of a sequence's first forward
        self._last: int | Tensor = -1
        self._end = 0

    def begin(self, call: ForwardCall) -> None:
        """Take note of a forward that begins."""
        if not self._continues(call):
            self._prompt = None
        self.call, self.calls = call, self.calls + 1

    def look(self, codes: Codes, tokenizer: Any = None) -> View:
        """The forward under way, as a site with these codes sees it."""
        tokens, start = self.call.tokens, self.call.start
        self._end = start + codes.shape[1]
        self.highest = max(self.highest, self._end - 1)
        if self._prompt is None:
            self._prompt, self._last = self._end, self._last_real()
        if tokens is not None and tuple(tokens.shape) != codes.shape:
            tokens = None
        last = self._last.to(codes.indices.device) if isinstance(self._last, Tensor) else self._last
        return View(codes, tokens, start, self._prompt, last, tokenizer)

    def _last_real(self) -> int | Tensor:
        """The prompt's last position, of each row where an attention mask says so."""
        mask = self.call.attention_mask
        if mask is None or mask.shape[-1] != self._end:
            return self._end - 1
        positions = torch.arange(self._end, device=mask.device)
        return torch.where(mask.bool(), positions, 0).amax(-1, keepdim=True)

    def _continues(self, call: ForwardCall) -> bool:
        """Whether a forward goes on with the sequence of the one before it."""
        if call.start:
            return call.start == self._end
        before, now = self.call.tokens, call.tokens
        if self.call.start or before is None or now is None or now.shape[1] != before.shape[1] + 1:
            return False
        return now.device == before.device and torch.equal(now[:, :-1], before)


def full_mask(where: Where | None, view: View) -> Tensor | None:
    """The mask of a forward, bool of the codes' batch shape; None for everywhere."""
    if where is None:
        return None
    return where.mask(view).to(view.codes.indices.device).expand(view.codes.shape)
