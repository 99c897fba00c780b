"""The list of faults that tests must catch is about the code as it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mutations import MUTATIONS, ROOT, survives


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name)
def test_each_fault_can_still_be_made(mutation):
    """What a fault replaces stands once in its file, and the tests that must catch it exist."""
    assert (ROOT / "saehooks" / mutation.file).read_text(encoding="utf-8").count(mutation.right) == 1
    assert mutation.right != mutation.wrong
    assert all((ROOT / "tests" / one).is_file() for one in mutation.files.split())


@pytest.mark.parametrize("name", ["positions: the end of a slice is inside"])
def test_a_fault_is_caught(name):
    """One of them, made in a copy, fails a test; ``python tests/mutations.py`` makes them all."""
    assert survives(next(one for one in MUTATIONS if one.name == name)) is None
