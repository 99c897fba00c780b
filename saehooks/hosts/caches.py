"""How many positions a cache holds, whichever library made it, and what is known of the text in it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

LENGTHLESS = ("conv_states", "ssm_states", "recurrent_states", "has_previous_state")
"""What a cache of states offers, which has no length."""

LENGTHLESS_NAMES = ("cache_params", "state", "mems", "past_buckets_states")
"""Arguments that are a cache whatever is given there."""


def cached_positions(cache: Any) -> int | None:
    """How many positions a cache holds: Hugging Face's, old or new, or TransformerLens's; None where it has no length.

    >>> import torch
    >>> cached_positions([(torch.zeros(1, 2, 7, 4), torch.zeros(1, 2, 7, 4))]), cached_positions(None)
    (7, 0)
    """
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except (ValueError, TypeError, NotImplementedError, AttributeError, IndexError):
            return None  # states alone, as in Mamba
    if hasattr(cache, "entries"):
        keys = getattr(cache.entries[0], "past_keys", None) if len(cache.entries) else None
        return 0 if keys is None else int(keys.shape[1])
    keys = _first_keys(cache)
    return None if keys is None else int(keys.shape[-2])


def find_cache(given: Iterable[tuple[str, Any]]) -> Any:
    """The cache among named values; None if there is none."""
    for name, value in given:
        if value is None or isinstance(value, (Tensor, bool, int, float, str)):
            continue
        if hasattr(value, "get_seq_length") or _first_keys(value) is not None:
            return value
        if (hasattr(value, "entries") and hasattr(value, "__getitem__")) or any(
            hasattr(value, one) for one in LENGTHLESS
        ):
            return value
        if name in LENGTHLESS_NAMES and not isinstance(value, dict):
            return value
    return None


def is_empty(cache: Any) -> bool:
    """Whether a cache without a length says that nothing was put into it yet."""
    said = getattr(cache, "has_previous_state", None)
    if callable(said):
        try:
            said = said()
        except ValueError:  # it has no layers yet
            return True
    return said is False


def _first_keys(cache: Any) -> Tensor | None:
    """The keys (batch, heads, pos, d_head) of the first layer of a cache that is a tuple of layers."""
    if not isinstance(cache, (tuple, list)) or not cache or not isinstance(cache[0], (tuple, list)) or not cache[0]:
        return None
    keys = cache[0][0]
    return keys if isinstance(keys, Tensor) and keys.dim() == 4 else None


@dataclass(frozen=True, eq=False)
class Kept:
    """What is known of the text in a cache after a forward."""

    end: int
    """Columns in it."""
    prompt: int
    """One more than the last column of the prompt."""
    turn: int
    """The first column of the turn that the prompt belongs to."""
    real: Tensor | None
    """(batch, end) bool, False at padding; None where all columns are text."""


class CacheMemory:
    """What is known of each cache, for as long as the cache lives."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref[Any], Kept]] = {}

    def __getitem__(self, cache: Any) -> Kept | None:
        anchor = _anchor(cache)
        found = self._kept.get(id(anchor))
        return found[1] if found is not None and found[0]() is anchor else None

    def __setitem__(self, cache: Any, kept: Kept) -> None:
        anchor = _anchor(cache)
        key, memory = id(anchor), self._kept
        try:
            memory[key] = weakref.ref(anchor, lambda _: memory.pop(key, None)), kept
        except TypeError:  # nothing can be remembered of it
            return


def _anchor(cache: Any) -> Any:
    """What lives as long as the cache does: a tuple of layers is made anew at each step, its first tensor is not."""
    keys = _first_keys(cache)
    if keys is None and isinstance(cache, (tuple, list)) and cache and isinstance(cache[0], Tensor):
        keys = cache[0]
    return cache if keys is None else keys
