"""Where an attachment acts: positions of each text, the same for every way of calling a model.

``where=`` takes

- ``sh.last``, ``sh.pooled``, ``sh.everywhere``, ``sh.positions([0, 3])``, ``sh.positions(slice(1, None))``,
  ``sh.steps(range(10))``, ``sh.tokens([60])``, ``sh.not_special(tokenizer)``, and ``a & b``, ``a | b``, ``~a`` of them;
- an int, a list of ints or a slice, as ``sh.positions`` takes them;
- a boolean mask of shape (pos,) or (batch, pos), by columns;
- a function ``(tokens, codes) -> mask``.

Left out, an attachment acts where its SAE was trained.

Positions count the real tokens of each text: padding has none, and nothing ever acts on it. Negative ones and
``sh.last`` count from the end of the *prompt*: what ``generate`` was given, else the forward itself; a forward of
several columns that continues a cache is a new turn, with a prompt of its own. For pictures, position 0 is the CLS
token.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from saehooks.codes import Codes
from saehooks.errors import WhereError
from saehooks.hosts.sequences import Columns
from saehooks.sparse_coder import SparseCoder


@dataclass(frozen=True, eq=False)
class View:
    """What a mask is made from: one forward, as one site sees it."""

    columns: Columns
    """Which positions of which texts they are."""
    codes: Codes
    """Codes of shape (batch, pos)."""
    tokenizer: Any = None
    """The model's own tokenizer, where it has one."""

    @classmethod
    def without_codes(cls, columns: Columns, acts: Tensor, tokenizer: Any = None) -> View:
        """Of activations (batch, pos, width) that were not encoded: where they are is known, and no code."""
        none = torch.zeros(0, dtype=torch.int64, device=acts.device)
        offsets = none.new_zeros(acts.shape[0] * acts.shape[1] + 1)
        return cls(columns, Codes(none, acts.new_zeros(0), offsets, tuple(acts.shape[:2]), 0), tokenizer)

    @property
    def tokens(self) -> Tensor | None:
        """(batch, pos) int64, None where they are not known."""
        return self.columns.tokens


class Where:
    """A rule that makes a mask, (pos,) or (batch, pos), for each forward."""

    asked: tuple[int, ...] = ()
    """The positions that are asked for by number, negative ones from the end of the prompt: an error on leaving the
    block if one of them never came."""
    asked_step = -1
    """The last forward that is asked for by number: an error on leaving the block if there were fewer."""

    def mask(self, view: View) -> Tensor | None:
        """Bool mask, (pos,) or (batch, pos); None for everywhere. Its values at padding do not matter."""
        raise TypeError(f"{type(self).__name__} does not say where")

    def __and__(self, other: Any) -> Where:
        return Both(self, as_where(other))

    def __or__(self, other: Any) -> Where:
        return Either(self, as_where(other))

    def __invert__(self) -> Where:
        return Not(self)


class Everywhere(Where):
    """All positions of every text; never padding."""

    def mask(self, view: View) -> Tensor | None:
        return None

    def __repr__(self) -> str:
        return "sh.everywhere"


everywhere = Everywhere()
"""All positions of every text, the first included; never padding."""


class PastFirst(Where):
    """All but the first position of each text: an attention sink, whose norm can be a hundred times that of the others.
    Of pictures nothing is left out."""

    def mask(self, view: View) -> Tensor | None:
        return None if view.columns.text.pictured else view.columns.place != 0

    def __repr__(self) -> str:
        return "all but the first"


past_first = PastFirst()
"""Where SAEs are trained unless something else is said."""


class Last(Where):
    """The last position of a text; while generating, the prompt's last and every one after it."""

    def mask(self, view: View) -> Tensor:
        return view.columns.place >= view.columns.length - 1

    def __repr__(self) -> str:
        return "sh.last"


last = Last()
"""The last position of each text, which in a CLIP's text tower is the end of the text.

While generating: the position from which each new token is predicted, thus the prompt's last and all after it.
"""


class Pooled(Where):
    """The position that the output of a CLIP's tower is read from."""

    def mask(self, view: View) -> Tensor:
        return view.columns.pooled()

    def __repr__(self) -> str:
        return "sh.pooled"


pooled = Pooled()
"""The position that the output of a CLIP's tower is read from: CLS of a picture, the end of a text."""


@dataclass(frozen=True, eq=False, repr=False)
class Pair(Where):
    """Two rules together: what either asks for is asked for."""

    one: Where
    other: Where

    @property
    def asked(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.one.asked + self.other.asked

    @property
    def asked_step(self) -> int:  # type: ignore[override]
        return max(self.one.asked_step, self.other.asked_step)


class Both(Pair):
    """Where two rules both hold."""

    def mask(self, view: View) -> Tensor | None:
        one, other = self.one.mask(view), self.other.mask(view)
        return other if one is None else one if other is None else one & other

    def __repr__(self) -> str:
        return f"({self.one!r} & {self.other!r})"


class Either(Pair):
    """Where one of two rules holds, or both."""

    def mask(self, view: View) -> Tensor | None:
        one, other = self.one.mask(view), self.other.mask(view)
        return None if one is None or other is None else one | other

    def __repr__(self) -> str:
        return f"({self.one!r} | {self.other!r})"


@dataclass(frozen=True, eq=False, repr=False)
class Steps(Where):
    """Every position of some of a block's forwards, and none of the others."""

    listed: tuple[int, ...] | slice

    @property
    def asked_step(self) -> int:  # type: ignore[override]
        if isinstance(self.listed, slice):
            return self.listed.start or 0
        return max(self.listed, default=-1)

    def mask(self, view: View) -> Tensor | None:
        number = view.columns.number
        listed = range(number + 1)[self.listed] if isinstance(self.listed, slice) else self.listed
        if number in listed:
            return None
        return torch.zeros(view.codes.shape[-1], dtype=torch.bool, device=view.codes.indices.device)

    def __repr__(self) -> str:
        if not isinstance(self.listed, slice):
            return f"sh.steps({list(self.listed)})"
        return f"sh.steps(slice({self.listed.start}, {self.listed.stop}, {self.listed.step}))"


@dataclass(frozen=True, eq=False, repr=False)
class Not(Where):
    """Where a rule does not hold; a position that it excludes need not come."""

    rule: Where

    def mask(self, view: View) -> Tensor | None:
        found = self.rule.mask(view)
        if found is None:
            return torch.zeros(view.codes.shape[-1], dtype=torch.bool, device=view.codes.indices.device)
        return ~found

    def __invert__(self) -> Where:
        return self.rule

    def __repr__(self) -> str:
        return f"~{self.rule!r}"


@dataclass(frozen=True, eq=False, repr=False)
class Positions(Where):
    """Positions listed one by one, negative ones from the end of the prompt."""

    listed: tuple[int, ...]

    @property
    def asked(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.listed

    def mask(self, view: View) -> Tensor:
        place, length = view.columns.place, view.columns.length
        found = [place == (p if p >= 0 else length + p) for p in self.listed]
        return reduce(torch.logical_or, found) if found else torch.zeros_like(place, dtype=torch.bool)

    def __repr__(self) -> str:
        return f"sh.positions({list(self.listed)})"


@dataclass(frozen=True, eq=False, repr=False)
class Span(Where):
    """A slice of positions, negative ends from the end of the prompt; an open end takes in generated positions."""

    span: slice

    @property
    def asked(self) -> tuple[int, ...]:  # type: ignore[override]
        begin = self.span.start
        return (begin,) if begin is not None and begin > 0 else ()

    def mask(self, view: View) -> Tensor:
        place = view.columns.place
        begin, step = self._end(self.span.start or 0, view), self.span.step or 1
        inside = place >= begin
        if step != 1:
            inside = inside & ((place - begin) % step == 0)
        end = self._end(self.span.stop, view)
        return inside if end is None else inside & (place < end)

    @staticmethod
    def _end(end: int | None, view: View) -> Any:
        if end is None or end >= 0:
            return end
        counted = view.columns.length + end
        return counted.clamp(min=0) if isinstance(counted, Tensor) else max(counted, 0)

    def __repr__(self) -> str:
        ends = [self.span.start, self.span.stop, *([] if self.span.step is None else [self.span.step])]
        return f"sh.positions(slice({', '.join(map(str, ends))}))"


@dataclass(frozen=True, eq=False, repr=False)
class Mask(Where):
    """A given mask over the prompt's columns, (pos,) or (batch, pos); positions generated after it are left alone."""

    given: Tensor

    def mask(self, view: View) -> Tensor:
        columns, device = view.columns, view.codes.indices.device
        (batch, pos), text = view.codes.shape, view.columns.text
        if columns.start is None or text.prompt is None:
            begin, prompt = 0, pos  # nothing is known of what comes before: the columns of this forward
        else:
            begin, prompt = columns.start, text.prompt
        given = self.given.to(device)
        if given.shape[-1] != prompt and given.shape[-1] == prompt - text.turn:
            begin, prompt = begin - text.turn, prompt - text.turn
        rows = given.shape[0] if given.dim() == 2 else 1
        if given.shape[-1] != prompt or batch % rows or (rows not in (1, batch) and text.generation is None):
            raise WhereError(
                f"where has shape {tuple(given.shape)}; expected ({prompt},) or ({batch}, {prompt}), "
                "one column for each position of the forward; a function or a slice fits any length"
            )
        if given.dim() == 2:
            given = given.repeat_interleave(batch // rows, 0)
        at = torch.arange(begin, begin + pos, device=device)
        return given[..., at.clamp(max=prompt - 1)] & (at < prompt)

    def __repr__(self) -> str:
        return f"a mask of shape {tuple(self.given.shape)}"


@dataclass(frozen=True, eq=False, repr=False)
class NotSpecial(Where):
    """Everywhere but on special tokens."""

    source: Any = None

    def mask(self, view: View) -> Tensor:
        if view.tokens is None:
            raise WhereError("not_special needs tokens, and this forward has none (images, or a call with embeddings)")
        source = self._tokenizer if self.source is not None else view.tokenizer
        if source is None:
            raise WhereError("this model carries no tokenizer: write sh.not_special(tokenizer)")
        ids, tokens = getattr(source, "all_special_ids", source), view.tokens
        ordinary = ~torch.isin(tokens, torch.tensor(list(ids), dtype=tokens.dtype, device=tokens.device))
        if hasattr(source, "eot_token_id"):  # CLIP pads with an ordinary token after the end of the text
            ordinary &= (tokens == source.eot_token_id).cumsum(-1) == 0
        return ordinary

    @property
    def _tokenizer(self) -> Any:
        if hasattr(self.source, "all_special_ids"):
            return self.source
        return getattr(self.source, "tokenizer", self.source)  # open_clip wraps the tokenizers of transformers

    def __repr__(self) -> str:
        if self.source is None:
            return "sh.not_special()"
        return f"sh.not_special({sorted(int(i) for i in getattr(self._tokenizer, 'all_special_ids', self._tokenizer))})"


@dataclass(frozen=True, eq=False, repr=False)
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

    def __repr__(self) -> str:
        return f"the function {getattr(self.function, '__name__', type(self.function).__name__)}"


# ------------------------------------------------------------- what users write


def positions(listed: int | Iterable[int] | slice) -> Where:
    """Positions of each text: ``positions([0, 3])``, ``positions(slice(1, None))``, ``positions(-1)``.

    Negative ones count from the end of the prompt, and an open slice takes in generated positions.
    """
    if isinstance(listed, slice):
        if listed.step is not None and listed.step < 1:
            raise WhereError(f"the step of {listed} must be positive")
        ends = (listed.start, listed.stop, listed.step)
        if not all(end is None or hasattr(end, "__index__") for end in ends):
            raise WhereError(f"the ends of a slice must be whole numbers; got {listed!r}")
        return Span(slice(*(None if end is None else end.__index__() for end in ends)))
    if hasattr(listed, "__index__"):
        listed = [listed]  # type: ignore[list-item]
    try:
        return Positions(tuple(p.__index__() for p in listed))  # type: ignore[union-attr]
    except (TypeError, AttributeError):
        raise WhereError(f"positions must be whole numbers or a slice; got {listed!r}") from None


def steps(listed: int | Iterable[int] | slice) -> Where:
    """All positions of some forwards: ``steps(0)``, ``steps(range(10))``, ``steps(slice(5, None))``.

    Forwards past the site are counted from 0 in each block. In a diffusion model, whose every denoising step is one
    forward, ``steps(range(10)) & mask`` acts at some places in the first ten steps.

    >>> steps(range(3)), steps(slice(5, None)) | steps(0)
    (sh.steps([0, 1, 2]), (sh.steps(slice(5, None, None)) | sh.steps([0])))
    """
    found = positions(listed)
    if isinstance(found, Span):
        ends = (found.span.start, found.span.stop)
        if all(end is None or end >= 0 for end in ends):
            return Steps(found.span)
    elif isinstance(found, Positions) and min(found.listed, default=0) >= 0:
        return Steps(found.listed)
    raise WhereError(f"steps are counted from 0, as the number of forwards is not known; got {listed!r}")


def not_special(tokenizer: Any = None) -> Where:
    """Skip special tokens (BOS, EOS, padding ...), by the tokenizer's ``all_special_ids``.

    Args:
        tokenizer: a tokenizer, or a list of token ids; the model's own tokenizer when left out.
    """
    return NotSpecial(tokenizer)


def tokens(listed: int | Iterable[int]) -> Where:
    """Where certain tokens are, such as the places of a picture in a multimodal model's text:
    ``sh.tokens(model.config.image_token_id)``.

    >>> tokens(60), ~tokens([0, 60])
    (~sh.not_special([60]), sh.not_special([0, 60]))
    """
    try:
        ids = [listed.__index__()] if hasattr(listed, "__index__") else [one.__index__() for one in listed]
    except (TypeError, AttributeError):
        raise WhereError(f"tokens must be token ids, whole numbers; got {listed!r}") from None
    return ~NotSpecial(ids)


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
    if isinstance(where, bool):
        raise WhereError(f"where={where}: write sh.everywhere for all positions, or leave the block out for none")
    if where is None:
        raise WhereError("where=None is no rule: leave it out, or write sh.everywhere for all positions")
    if callable(where):
        return _rule(where)
    if hasattr(where, "__array__") or _all_bools(where):
        where = torch.as_tensor(where)
    if not isinstance(where, Tensor):
        return positions(where)
    if where.dtype == torch.bool:
        if where.dim() not in (1, 2):
            raise WhereError(f"where has shape {tuple(where.shape)}; expected (pos,) or (batch, pos)")
        return Mask(where)
    looks_like_mask = where.dim() == 1 and where.numel() > 2 and bool(((where == 0) | (where == 1)).all())
    if where.dim() > 1 or where.is_floating_point() or looks_like_mask:
        raise WhereError(
            f"where is {where.dtype} of shape {tuple(where.shape)}{', all 0 and 1' if looks_like_mask else ''}; "
            "expected torch.bool of shape (pos,) or (batch, pos): write mask.bool(), or positions as a list"
        )
    return positions(where.reshape(-1).tolist())


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


# ------------------------------------------------------------- where it was left out


@dataclass(frozen=True, eq=False, repr=False)
class LeftOut(Where):
    """The rule when ``where`` is left out: positions that it names need not come."""

    rule: Where

    def mask(self, view: View) -> Tensor | None:
        return self.rule.mask(view)

    def __repr__(self) -> str:
        return repr(self.rule)


def where_of(sae: SparseCoder, where: Any = None, *, training: bool = False) -> Where:
    """The rule of an SAE: what was asked for; left out (None), where the SAE was trained, as its metadata say.

    Args:
        training: what does not say is trained on all but the first position, and otherwise acts everywhere.
    Raises: WhereError for anything that is no rule.
    """
    if where is not None:
        return as_where(where)
    said = (sae.cfg.metadata.get("training") or {}).get("positions")
    known = parse(said) if isinstance(said, str) else None
    return LeftOut(known or (past_first if training else everywhere))


_MAKERS: dict[str, Callable[..., Where]] = {
    "positions": positions,
    "not_special": not_special,
    "steps": steps,
    "tokens": tokens,
}
OLDER_SPAN, OLDER_LIST = re.compile(r"positions \[(-?\d*):(-?\d*)\]"), re.compile(r"^positions (\[[-\d, ]*\])$")
"""How metadata wrote rules until 0.1: ``positions [1:]``, ``positions [0, 3]``."""

_NAMES = {"everywhere": everywhere, "last": last, "pooled": pooled}


def parse(text: str) -> Where | None:
    """The rule that a repr, or the metadata of an SAE, describes; None where it describes none (a mask, a function).

    >>> parse("sh.positions([0, 3]) & ~sh.last"), parse("all but the first"), parse("a mask of shape (4,)")
    ((sh.positions([0, 3]) & ~sh.last), all but the first, None)
    """
    named = {"all but the first": past_first, "all": everywhere}.get(text)
    if named is not None:
        return named
    span = OLDER_SPAN.fullmatch(text)
    if span is not None:
        return positions(slice(*(int(end) if end else None for end in span.groups())))
    try:
        return _evaluate(ast.parse(OLDER_LIST.sub(r"sh.positions(\1)", text), mode="eval").body)
    except (SyntaxError, ValueError, WhereError):
        return None


def _evaluate(node: ast.AST) -> Where:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
        one, other = _evaluate(node.left), _evaluate(node.right)
        return one & other if isinstance(node.op, ast.BitAnd) else one | other
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_evaluate(node.operand)
    call = node if isinstance(node, ast.Call) else None
    name: ast.AST = node if call is None else call.func
    if not (isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name) and name.value.id == "sh"):
        raise ValueError("no rule")
    if call is None and name.attr in _NAMES:
        return _NAMES[name.attr]
    if call is not None and name.attr in _MAKERS and len(call.args) <= 1:
        return _MAKERS[name.attr](*(_literal(one) for one in call.args))
    raise ValueError("no rule")


def _literal(node: ast.AST) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "slice":
        return slice(*(ast.literal_eval(one) for one in node.args))
    return ast.literal_eval(node)


# ------------------------------------------------------- over all of a block's forwards


def full_mask(where: Where, view: View) -> Tensor | None:
    """The mask of a forward, bool of the codes' batch shape, False at padding; None for everywhere."""
    mask, device = where.mask(view), view.codes.indices.device
    real = view.columns.real
    if mask is None:
        return real
    mask = mask.to(device).expand(view.codes.shape)
    return mask if real is None else mask & real


@dataclass(frozen=True, eq=False, repr=False)
class Judged(Where):
    """A rule of one of several blocks; ``came`` judges after all of them whether its positions came."""

    rule: Where
    came: Came

    def mask(self, view: View) -> Tensor | None:
        self.came.add(view.columns)
        return self.rule.mask(view)

    def __repr__(self) -> str:
        return repr(self.rule)


class Came:
    """Tracks which of the positions that a rule asks for came, over all forwards past one site."""

    def __init__(self, where: Where):
        self._asked = tuple(dict.fromkeys(where.asked))
        self._asked_step, self._steps = where.asked_step, 0
        self._came: set[int] = set()
        self._end = 0
        self._told: Tensor | None = None  # the same, as padded batches told it: not waited for before the end

    def add(self, columns: Columns) -> None:
        """Add one forward."""
        self._steps = max(self._steps, columns.number + 1)
        if len(self._came) == len(self._asked):
            return
        place, length = columns.place, columns.length
        if isinstance(length, int) and place.dim() == 1:
            begin, end = columns.start or 0, (columns.start or 0) + columns.shape[1]
            self._came |= {p for p in self._asked if begin <= (p if p >= 0 else length + p) < end}
            self._end = max(self._end, end)
            return
        real = place >= 0
        came = [((place == (p if p >= 0 else length + p)) & real).any() for p in self._asked]
        told = torch.stack([*came, place.max() + 1])
        self._told = told if self._told is None else torch.maximum(self._told, told.to(self._told.device))

    def check(self, site: str) -> None:
        """Raise WhereError if a position, or a forward, that was asked for never came."""
        if self._asked_step >= self._steps:
            raise WhereError(
                f"step {self._asked_step} at '{site}' never came: the forwards of this block were steps "
                f"0 to {self._steps - 1}"
            )
        if self._told is not None:
            *came, end = self._told.tolist()
            self._came |= {p for p, it_did in zip(self._asked, came, strict=True) if it_did}
            self._end = max(self._end, end)
        missing = [p for p in self._asked if p not in self._came]
        if missing:
            raise WhereError(
                f"position {missing[0]} at '{site}' never came: the forwards of this block had positions "
                f"0 to {self._end - 1}"
            )
