"""The page `.ci/HOUSE.md` says where behaviours live: what it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import saehooks

PACKAGE = Path(saehooks.__file__).parent
PAGE = Path(__file__).parents[1] / ".ci" / "HOUSE.md"


def rows() -> list[list[str]]:
    """Cells of the table of behaviours, without its two head lines."""
    table = PAGE.read_text(encoding="utf-8").partition("## A stranger's test")[2].partition("\nThe sum is")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def definitions(file: Path) -> set[str]:
    """Names of a module's functions and classes, methods with their class."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].replace("`", ""))
def test_what_the_page_names_exists(row):
    """Every definition on a path is there, and the number beside the path is that of its files."""
    _, before, files_before, now, files = row
    assert int(files_before) == len(before.split(", "))
    places = [place.split(":") for place in re.findall(r"`([^`]+)`", now)]
    assert len({file for file, _ in places}) == int(files)
    for file, name in places:
        assert name in definitions(PACKAGE / file), f"{file} does not define {name}"


def test_the_page_adds_up():
    """Twelve behaviours, and the two sums under the table."""
    assert len(rows()) == 12
    sums = re.search(r"The sum is (\d+) before and (\d+) now", PAGE.read_text(encoding="utf-8"))
    assert sums is not None
    assert [int(one) for one in sums.groups()] == [sum(int(row[i]) for row in rows()) for i in (2, 4)]
