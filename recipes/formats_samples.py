"""One small file of every format that `sh.load` reads, as its library writes it, and what its library computes.

The formulas are written out in plain torch, from the sources of the libraries; they know nothing of saehooks. The table
(`formats_table.py`), the fuzzing (`formats_fuzz.py`) and the tests use these files.
"""

from __future__ import annotations

from formats_folders import dl_samples, scope_samples, sparsify_samples
from formats_parts import D_IN, Sample
from formats_pickles import pickle_samples
from formats_saelens import lens_samples

__all__ = ["D_IN", "Sample", "samples"]


def samples() -> list[Sample]:
    """One file of every format."""
    return [*lens_samples(), *sparsify_samples(), *dl_samples(), *scope_samples(), *pickle_samples()]
