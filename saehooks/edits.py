"""Edits: functions from Codes to Codes, given to ``attach`` and reached as ``sh.edits``.

Each of ``zero clamp scale add keep`` makes a function. Functions given together run in order, and
any function of your own, ``(codes) -> codes`` or ``(codes, context) -> codes``, can stand among them.

>>> import torch
>>> codes = Codes.from_dense(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]))
>>> clamp({0: 5.0})(codes).dense()
tensor([[5., 2., 0.],
        [5., 0., 3.]])
>>> compose(scale({1: 0.5}), zero([2]))(codes).dense()
tensor([[0., 1., 0.],
        [1., 0., 0.]])
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from saehooks.answers import no_attribute
from saehooks.codes import Codes
from saehooks.errors import ConfigError, LatentError, WidthError
from saehooks.support import offsets_of

Value: TypeAlias = float | Tensor
"""A number, or a tensor that broadcasts to the batch shape of the codes, such as (batch, pos)."""

EditFunction: TypeAlias = Callable[..., Codes]
"""``(codes) -> codes`` or ``(codes, context) -> codes``."""


@dataclass(frozen=True, eq=False)
class Context:
    """Where an edit acts, for custom edits that take a second argument."""

    site: str
    """Name of the site, as in ``sh.sites(model)``."""
    tokens: Tensor | None
    """(batch, pos) int64 tokens of this forward, None for images and embeddings."""
    positions: Tensor | None
    """int64, the position of each column in its text, also under a KV cache: (pos,), or (batch, pos) in a padded batch
    with -1 at padding; None where they cannot be known."""


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """An edit that knows its latents, so that they are checked before any hook is registered."""

    name: str
    latents: tuple[int, ...]
    function: Callable[[Codes, Context | None], Codes]

    def __call__(self, codes: Codes, context: Context | None = None) -> Codes:
        self.check(codes.d_sae)
        return self.function(codes, context)

    def check(self, d_sae: int) -> None:
        """Raise LatentError unless every latent lies in ``0 .. d_sae - 1``."""
        wrong = [latent for latent in self.latents if not 0 <= latent < d_sae]
        if wrong:
            raise LatentError(f"{self!r}: latent {wrong[0]} is out of range; this SAE has latents 0 to {d_sae - 1}")

    def __repr__(self) -> str:
        if not self.latents:
            return self.name
        shown = ", ".join(map(str, self.latents[:6])) + (", ..." if len(self.latents) > 6 else "")
        return f"{self.name}([{shown}])"


# ------------------------------------------------------------------- the edits


def zero(latents: int | Iterable[int] | Tensor) -> Edit:
    """Set latents, an int, several, or a tensor (n,), to zero where selected; they stay in the support, with value
    0."""
    chosen = latent_list(latents)

    def function(codes: Codes) -> Codes:
        return codes.with_values(codes.values.masked_fill(_listed(codes, chosen), 0.0))

    return _edit("zero", chosen, function)


def keep(latents: int | Iterable[int] | Tensor) -> Edit:
    """Set every latent to zero except these: an int, several, or a tensor (n,)."""
    chosen = latent_list(latents)

    def function(codes: Codes) -> Codes:
        return codes.with_values(codes.values.masked_fill(~_listed(codes, chosen), 0.0))

    return _edit("keep", chosen, function)


def keep_top(k: int) -> Edit:
    """Keep the k strongest latents of each position; the others stay in the support with the value 0.

    Of equal values the lower latent stays. ``sh.edits.strongest`` is another name of it.

    >>> keep_top(1)(Codes.from_dense(torch.tensor([[1.0, 3.0, 2.0]]))).values
    tensor([0., 3., 0.])
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 0:
        raise ConfigError(f"keep_top(k) needs a whole number k >= 0, got {k!r}")

    def function(codes: Codes) -> Codes:
        codes = codes.trimmed()
        order = torch.sort(codes.values.detach(), descending=True, stable=True).indices
        order = order[torch.sort(codes.rows[order], stable=True).indices]  # each row's entries, strongest first
        rank = torch.empty_like(order)
        rank[order] = torch.arange(order.numel(), device=order.device) - codes.offsets[codes.rows[order]]
        return codes.with_values(codes.values.masked_fill(rank >= k, 0.0))

    return Edit(f"keep_top({k})", (), lambda codes, context: function(codes))


strongest = keep_top


def clamp(values: Mapping[int, Value]) -> Edit:
    """Set each latent to its value in every row, inserting it where it was not selected."""
    chosen = _listed_with_values(values, "clamp({901: 8.0})")

    def function(codes: Codes) -> Codes:
        full, place = _with_latents(codes, chosen)
        return full.with_values(full.values.index_put((place,), _row_values(values, codes).reshape(-1)))

    return _edit("clamp", chosen, function)


def add(deltas: Mapping[int, Value]) -> Edit:
    """Add to each latent in every row, a latent that was not selected starting at 0."""
    chosen = _listed_with_values(deltas, "add({901: 4.0})")

    def function(codes: Codes) -> Codes:
        full, place = _with_latents(codes, chosen)
        moved = full.values[place] + _row_values(deltas, codes).reshape(-1)
        return full.with_values(full.values.index_put((place,), moved))

    return _edit("add", chosen, function)


def scale(factors: Mapping[int, Value]) -> Edit:
    """Multiply each latent by its factor wherever it is selected."""
    chosen = _listed_with_values(factors, "scale({9: 0.5})")

    def function(codes: Codes) -> Codes:
        entries = _listed(codes, chosen).nonzero().squeeze(1)
        column = torch.zeros(codes.d_sae, dtype=torch.int64, device=codes.indices.device)
        column[list(chosen)] = torch.arange(len(chosen), device=column.device)
        grid = _row_values(factors, codes)
        factor = grid[codes.rows[entries], column[codes.indices[entries]]]
        return codes.with_values(codes.values.index_put((entries,), codes.values[entries] * factor))

    return _edit("scale", chosen, function)


def __getattr__(name: str) -> NoReturn:
    raise no_attribute(
        sys.modules[__name__],
        name,
        {
            **dict.fromkeys(("ablate", "remove", "drop"), "write edits.zero([1204, 77])"),
            **dict.fromkeys(("set", "fix"), "write edits.clamp({901: 8.0})"),
            **dict.fromkeys(("steer", "shift"), "write edits.add({901: 4.0})"),
            **dict.fromkeys(("multiply", "amplify"), "write edits.scale({9: 0.5})"),
            **dict.fromkeys(("topk", "top_k", "top"), "write edits.keep_top(k)"),
        },
        f"module {__name__!r}",
    )


MAKERS = (zero, keep, keep_top, clamp, add, scale)
"""What makes an edit and is none."""


def compose(*edits: EditFunction) -> Edit:
    """Run edits one after the other, as one edit."""
    latents = tuple(dict.fromkeys(latent for edit in edits for latent in getattr(edit, "latents", ())))
    return Edit("compose", latents, lambda codes, context: run(edits, codes, context))


def run(edits: Iterable[EditFunction], codes: Codes, context: Context | None = None) -> Codes:
    """Apply edits in order, and check what functions of the user's own return.

    Raises: ConfigError when an edit does not return Codes of the same batch with ascending latents;
        LatentError when it lists a latent that the SAE does not have.
    """
    for edit in edits:
        if isinstance(edit, Edit):
            codes = edit(codes, context)
        else:
            copy = _copied(codes)
            edited = edit(copy, context) if _takes_context(edit) else edit(copy)
            if isinstance(edited, Codes):
                edited = _as_before(edited, copy, codes)
            _check_edited(edit, edited, codes)
            codes = edited if edited.shift is codes.shift else replace(edited, shift=codes.shift)
    return codes


def _copied(codes: Codes) -> Codes:
    """A copy that an edit may write into."""
    codes = codes.trimmed()
    parts = {name: getattr(codes, name) for name in ("indices", "values", "offsets", "scale")}
    return replace(codes, **{name: part.clone() for name, part in parts.items() if part is not None})


def _as_before(edited: Codes, copy: Codes, codes: Codes) -> Codes:
    """The edited codes, with each part of the copy that the edit did not write into replaced by the original."""
    original = codes.trimmed()
    names = [name for name in ("indices", "offsets", "scale") if getattr(edited, name) is getattr(copy, name)]
    same = [name for name in names if _untouched(getattr(copy, name), getattr(original, name))]
    return replace(edited, **{name: getattr(original, name) for name in same})


def _untouched(part: Tensor | None, original: Tensor | None) -> bool:
    """Whether a clone of a tensor was not written into."""
    if part is None or original is None:
        return part is original
    # A clone starts to count at 0; under inference mode nothing is counted.
    return torch.equal(part, original) if part.is_inference() else part._version == 0


def as_edits(edits: Any) -> tuple[EditFunction, ...]:
    """One edit or several as a tuple of functions.

    Raises: ConfigError when one of them is no function.
    """
    listed = (edits,) if callable(edits) or not isinstance(edits, Iterable) else tuple(edits)
    for one in listed:
        if one in MAKERS:
            raise ConfigError(f"{one.__name__} makes an edit: write sh.edits.{one.__name__}(...), with what it needs")
        if not callable(one):
            raise ConfigError(f"an edit is a function from Codes to Codes, got {one!r}; did you mean edits.zero([3])?")
    return listed


# ------------------------------------------------------- arithmetic between codes


def merge_rows(original: Codes, edited: Codes, mask: Tensor) -> Codes:
    """Rows of ``edited`` where ``mask`` (bool, batch shape) holds, rows of ``original`` elsewhere."""
    chosen = mask.reshape(-1)
    if edited.indices is original.indices and edited.scale is original.scale:
        return original.with_values(torch.where(chosen[original.rows], edited.values, original.values))
    count = chosen.numel()
    flat = [replace(codes, shape=(count,)) for codes in (original, edited)]
    rows = torch.arange(count, device=chosen.device)
    merged = Codes.cat(flat).select_rows(torch.where(chosen, rows + count, rows), original.shape)
    merged = replace(merged, shift=original.shift)
    return replace(merged, scale=original.scale) if edited.scale is original.scale else merged


def difference(edited: Codes, original: Codes) -> Codes:
    """``edited - original`` over both supports: exactly 0 where nothing changed."""
    if edited.indices is original.indices:
        return original.with_values(edited.values - original.values)
    keys, place = torch.unique(torch.cat([_keys(edited), _keys(original)]), return_inverse=True)
    values = torch.cat([edited.values, -original.values])
    values = values.new_zeros(keys.numel()).index_add(0, place, values)
    return _from_keys(keys, values, original)


def same_scale(edited: Codes, original: Codes) -> bool:
    """Whether both have the same row scales and shifts, so that only their values can differ."""
    one, other = edited.scale, original.scale
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def without_zeros(codes: Codes) -> Codes:
    """The same codes with the entries that hold exactly 0 left out."""
    held = codes.values != 0
    return _from_keys(_keys(codes)[held], codes.values[held], codes)


def latent_list(latents: Any) -> tuple[int, ...]:
    """Latents given as an int, a list or a tensor, as a tuple of ints.

    Raises: LatentError when they are not whole numbers.
    """
    if isinstance(latents, Mapping):
        raise LatentError(
            f"expected latents, as in [1204, 77], got {latents!r}; clamp and steer take a mapping from latent to number"
        )
    if hasattr(latents, "__array__"):
        given = torch.as_tensor(latents)
        if given.dtype == torch.bool:
            raise LatentError("latents must be whole numbers, got a mask: write mask.nonzero()[:, 0]")
        latents = given.reshape(-1).tolist()
    try:
        listed = [latents] if hasattr(latents, "__index__") else list(latents)
        if any(isinstance(latent, bool) for latent in listed):
            raise TypeError
        return tuple(dict.fromkeys(latent.__index__() for latent in listed))
    except (TypeError, AttributeError):
        raise LatentError(f"latents must be whole numbers, as in [1204, 77]; got {latents!r}") from None


# --------------------------------------------------------------------- helpers


def _edit(name: str, latents: tuple[int, ...], function: Callable[[Codes], Codes]) -> Edit:
    return Edit(name, latents, lambda codes, context: function(codes))


def _listed_with_values(values: Any, example: str) -> tuple[int, ...]:
    """The latents of a mapping, all of whose values are numbers or tensors; ``example`` is shown if they are not."""
    if not isinstance(values, Mapping):
        raise LatentError(f"expected a mapping from latent to number, as in {example}; got {values!r}")
    chosen = latent_list(list(values))
    for latent, value in values.items():
        if not isinstance(value, Tensor) and hasattr(value, "__float__") and not math.isfinite(value):
            raise LatentError(f"expected a finite number for latent {latent}, as in {example}; got {value!r}")
        if not isinstance(value, Tensor) and not hasattr(value, "__float__"):
            raise LatentError(f"expected a number or a tensor for latent {latent}, as in {example}; got {value!r}")
    return chosen


def _listed(codes: Codes, latents: Sequence[int]) -> Tensor:
    """(nnz,) bool: which entries belong to the given latents."""
    table = torch.zeros(codes.d_sae, dtype=torch.bool, device=codes.indices.device)
    table[list(latents)] = True
    return table[codes.indices]


def _keys(codes: Codes) -> Tensor:
    """(nnz,) int64, ``row * d_sae + latent``: ascending over all entries."""
    return codes.rows * codes.d_sae + codes.indices


def _from_keys(keys: Tensor, values: Tensor, like: Codes) -> Codes:
    """Codes from ascending keys, with the batch shape and scale of ``like``."""
    rows = torch.div(keys, like.d_sae, rounding_mode="floor")
    sizes = torch.bincount(rows, minlength=math.prod(like.shape))
    return replace(like, indices=keys - rows * like.d_sae, values=values, offsets=offsets_of(sizes))


def _with_latents(codes: Codes, latents: Sequence[int]) -> tuple[Codes, Tensor]:
    """Codes that list the latents in every row, and the place of each, (rows * len(latents),) row by row."""
    keys, device = _keys(codes), codes.indices.device
    rows = torch.arange(math.prod(codes.shape), device=device)
    wanted = (rows[:, None] * codes.d_sae + torch.tensor(latents, dtype=torch.int64, device=device)).reshape(-1)
    missing = wanted[~torch.isin(wanted, keys, assume_unique=True)]
    if missing.numel():
        keys, order = torch.cat([keys, missing]).sort()
        values = torch.cat([codes.values, codes.values.new_zeros(missing.numel())])[order]
        codes = _from_keys(keys, values, codes)
    return codes, torch.searchsorted(keys, wanted)


def _row_values(values: Mapping[int, Value], codes: Codes) -> Tensor:
    """The value of each latent in each row, (rows, latents)."""
    columns = []
    for latent, value in values.items():
        column = torch.as_tensor(value, dtype=codes.values.dtype, device=codes.values.device)
        try:
            columns.append(column.expand(codes.shape).reshape(-1))
        except RuntimeError:
            raise WidthError(
                f"the value of latent {latent} has shape {tuple(column.shape)}; expected a number or a tensor "
                f"that broadcasts to the batch shape {tuple(codes.shape)}"
            ) from None
    return torch.stack(columns, -1) if columns else codes.values.new_zeros(math.prod(codes.shape), 0)


def _takes_context(edit: EditFunction) -> bool:
    """Whether an edit must be given a second argument."""
    try:
        parameters = inspect.signature(edit).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 and (positional[1].default is inspect.Parameter.empty or positional[1].name == "context")


def _check_edited(edit: EditFunction, edited: Any, codes: Codes) -> None:
    name = getattr(edit, "__name__", repr(edit))
    if not isinstance(edited, Codes):
        raise ConfigError(f"edit {name} returned {type(edited).__name__}; an edit takes Codes and returns Codes")
    if edited.shape != codes.shape or edited.d_sae != codes.d_sae:
        raise ConfigError(f"edit {name} returned {edited!r} for {codes!r}: shape and d_sae must stay as they are")
    if (edited.scale is None) != (codes.scale is None):
        raise ConfigError(
            f"edit {name} changed whether codes carry a per-row scale; build them with codes.with_values(...) "
            "or dataclasses.replace(codes, ...), or pass scale=codes.scale to Codes.from_dense"
        )
    if edited.indices is codes.indices or not edited.indices.numel():
        return
    low, high = (int(v) for v in edited.indices.aminmax())
    if low < 0 or high >= codes.d_sae:
        wrong = low if low < 0 else high
        raise LatentError(f"edit {name} returned latent {wrong}; this SAE has latents 0 to {codes.d_sae - 1}")
    if not bool((_keys(edited).diff() > 0).all()):
        raise ConfigError(f"edit {name} returned latents out of order or twice: they must ascend within each row")
