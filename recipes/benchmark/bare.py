"""Importing this makes saehooks importable where only torch, Triton and numpy are installed, as on a GPU machine.

Packages that saehooks needs for printing and for files get hollow stand-ins where they are missing; nothing that is
measured or tested there uses them. It is a pytest plugin, too: ``pytest -p bare``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

NAMES = ("rich", "safetensors")


class Hollow(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Absent:
    """Finds hollow modules for packages that are not installed."""

    def __init__(self, *names: str) -> None:
        self.names = [name for name in names if not self._installed(name)]

    @staticmethod
    def _installed(name: str) -> bool:
        try:
            return bool(import_module(name))
        except ImportError:
            return False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Hollow(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


sys.meta_path.insert(0, Absent(*NAMES))
sys.path.insert(0, str(Path(__file__).parents[2]))
