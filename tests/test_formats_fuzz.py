"""Damaged files of every format are read or refused, and nothing else happens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "recipes"))
pytest.importorskip("resource")  # memory is limited as only Unix can
import formats_fuzz
import formats_samples

SAMPLES = {sample.name: sample for sample in formats_samples.samples()}


@pytest.mark.parametrize("name", SAMPLES)
def test_nothing_but_errors_of_saehooks_comes_out_of_a_damaged_file(name):
    """Bits, bytes, cuts, settings, types and sizes: no crash, no memory beyond the file, no file touched."""
    ends, wrong = formats_fuzz.fuzz(SAMPLES[name], 8, seed=1)
    assert wrong == []
    assert sum(ends.values()) == 8
