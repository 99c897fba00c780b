"""Compiles a loop with numba: on first use, cached on disk where possible, without the interpreter lock."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numba
from numba.core.caching import FunctionCache

# Sums may be reordered, so that they vectorise; NaN and infinity keep their meaning.
_FLAGS = {"reassoc", "contract", "nsz"}


def numba_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop with numba."""
    settings: dict[str, Any] = {"nogil": True, "fastmath": _FLAGS, "boundscheck": False, "error_model": "numpy"}
    compiled = numba.njit(**settings)(function)
    with suppress(RuntimeError):  # no folder that could hold the cache can be written
        compiled._cache = _Cache(function)
    return compiled


class _Cache(FunctionCache):
    """Numba's cache on disk. A full disk or a damaged file costs compiling a loop again, not the loop."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)
