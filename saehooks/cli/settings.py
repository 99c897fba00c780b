"""Options of a command made from the fields of a dataclass: names, types, defaults and help are said once, there."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
import typing
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any


def add_settings(parser: Any, kind: type, prefix: str = "", skip: tuple[str, ...] = ()) -> None:
    """Add an option for each field of a dataclass: ``warmup_steps`` becomes ``--warmup-steps``.

    Args:
        parser: a parser or a group of one.
        kind: the dataclass; the text under a field is the option's help.
        prefix: of the names, such as ``"loss-"``.
        skip: fields without an option.
    """
    hints, texts = typing.get_type_hints(kind), field_texts(kind)
    for field in dataclasses.fields(kind):
        if field.name in skip:
            continue
        name = f"--{prefix}{field.name.replace('_', '-')}"
        default = "" if field.default is None else f" ({_shown(field.default)})"
        text = (texts.get(field.name, "").split(". ")[0].rstrip(".") + default).replace("%", "%%")
        options = {
            "dest": _dest(field.name, prefix),
            "default": argparse.SUPPRESS,
            "help": text,
            **_kind(hints[field.name]),
        }
        parser.add_argument(name, **options)


def given_settings(arguments: argparse.Namespace, kind: type, prefix: str = "") -> dict[str, Any]:
    """The fields of a dataclass that a command was given."""
    names = [field.name for field in dataclasses.fields(kind)]
    found = {name: getattr(arguments, _dest(name, prefix)) for name in names if hasattr(arguments, _dest(name, prefix))}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def field_texts(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    texts = {}
    for field, text in pairwise(body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)):
            continue
        if isinstance(text.value, ast.Constant):
            texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def _dest(name: str, prefix: str) -> str:
    return f"setting_{prefix.replace('-', '_')}{name}"


def _kind(hint: Any) -> dict[str, Any]:
    """What argparse needs to read a value of a type."""
    if typing.get_origin(hint) in (UnionType, typing.Union):
        hint = next(one for one in typing.get_args(hint) if one is not NoneType)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        if inner[-1] is Ellipsis:
            return {"type": inner[0], "nargs": "+", "metavar": "X"}
        return {"type": inner[0], "nargs": len(inner), "metavar": tuple(["X"] * len(inner))}
    return {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "NAME")}


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
