"""How a loop is compiled: on first use, kept on disk where that is possible, without the interpreter lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

# Sums may be reordered, so that they vectorise; NaN and infinity keep their meaning.
_FLAGS = {"reassoc", "contract", "nsz"}


def numba_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop with numba."""
    settings: dict[str, Any] = {"nogil": True, "fastmath": _FLAGS, "boundscheck": False, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **settings)(function)
    except RuntimeError:
        # No folder that could hold the cache can be written.
        return numba.njit(**settings)(function)
