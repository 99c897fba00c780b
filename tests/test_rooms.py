"""The house rules: which module may import which, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import saehooks

PACKAGE = Path(saehooks.__file__).parent
TABLE = """
    errors answers known_bad precision storage hub support codes kernels activations dictionaries refinement sae_config
    sparse_coder sae ranks metrics formats hosts edits where show trace attachments streams evaluation training
    presets causal latents demo doctor cli __main__
"""
ROOMS = TABLE.split()
HEAVY = [
    "transformer_lens",
    "open_clip",
    "matplotlib",
    "triton",
    "numba",
    "transformers",
    "datasets",
    "IPython",
    "rich",
]


def rooms_imported(file: Path) -> set[str]:
    """The rooms a file imports from, wherever in the file, but not what only the type checker reads."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for child in ast.walk(statement)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("saehooks.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "saehooks":
            names |= {f"saehooks.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("saehooks."):
            names.add(str(node.module))
    return {name.split(".")[1] for name in names} & set(ROOMS) | {
        name.split(".")[1] for name in names if name.count(".")
    }


def modules() -> list[Path]:
    return sorted(file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py" or file.parent != PACKAGE)


def run_afresh(listing: str) -> str:
    """What a listing prints in a new interpreter."""
    return subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_from_a_later_room_to_an_earlier_one(file):
    """No module imports a room that comes after its own; every module has a place in the table."""
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in ROOMS, f"{room} has no place in the table of rooms"
    for other in rooms_imported(file) - {room}:
        assert other in ROOMS, f"{file.name} imports {other}, which has no place in the table"
        assert ROOMS.index(other) < ROOMS.index(room), f"{file.name} ({room}) imports {other}, a later room"


def modules_imported(file: Path) -> set[str]:
    """The modules of the package a file imports, wherever in the file, also those only the type checker reads."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module for name in found if name.split(".")[0] == "saehooks" and (module := nearest_module(name))}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def nearest_module(name: str) -> str:
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def test_imports_make_no_circle():
    """No module imports itself by way of others, not inside a function and not for the type checker either."""
    arrows = {name: modules_imported(file) - {name} for name, file in MODULES.items()}
    assert sum(map(len, arrows.values())) > 500
    list(TopologicalSorter(arrows).static_order())  # raises CycleError, which lists the circle


def test_importing_saehooks_loads_no_heavy_package():
    """``import saehooks`` stays light: hosts and plotting are imported where they are used."""
    listing = f"import saehooks, sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    assert run_afresh(listing).split() == []


def test_library_code_has_no_assert():
    """A wrong input raises an error of its own; ``assert`` is for tests."""
    asserts = [
        f"{file.name}:{node.lineno}"
        for file in modules()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    ]
    assert asserts == []


def test_public_names_are_few_and_exist():
    """``saehooks.__all__`` stays short and each name in it can be reached."""
    names = getattr(saehooks, "__all__", [])
    assert len(names) <= 40
    assert [name for name in names if not hasattr(saehooks, name)] == []


EVERYTHING = """
import pkgutil, sys, saehooks as sh
before = {name: getattr(sh, name) for name in sh.__all__}
for module in pkgutil.walk_packages(sh.__path__, "saehooks."):
    if not any(other in module.name for other in ("triton", ".gpu", "_plugin")):  # need what may not be installed
        __import__(module.name)
print(*[name for name in before if before[name] is not getattr(sh, name)], "changed;", "hidden:", end=" ")
loaded = [(name, *name.rpartition(".")[::2]) for name in sys.modules if name.startswith("saehooks.")]
print(*sorted(name for name, room, own in loaded if getattr(sys.modules[room], own) is not sys.modules[name]))
"""


def test_no_function_hides_a_module_of_its_name():
    """After every module of the package has been imported, the public names are what they were, and each module is
    reached by its name; only the entry point of the command line is called as its module is."""
    assert run_afresh(EVERYTHING).strip() == "changed; hidden: saehooks.cli.main"
