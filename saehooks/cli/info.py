"""`saehooks info`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from saehooks.cli.arguments import command


def register(commands: Any) -> None:
    epilog = "example:\n  saehooks info saes/mine"
    parser = command(commands, "info", "say what an SAE is, where it belongs and how it was trained", epilog, run)
    parser.add_argument("sae", help="folder or hub id of the SAE")
    parser.add_argument("--json", action="store_true", help="print its configuration as JSON")


def run(arguments: argparse.Namespace) -> None:
    import saehooks as sh
    from saehooks.show import terminal

    sae = sh.load(arguments.sae)
    described = sae.cfg.to_dict()
    if arguments.json:
        print(json.dumps(described, indent=1))
        return
    size = sum(parameter.numel() for parameter in sae.parameters())
    print(sae)
    print(terminal.render(terminal.pairs({"parameters": size, **flattened(described.get("metadata", {}))})))


def flattened(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one list of dotted names.

    >>> flattened({"training": {"lr": 0.001, "steps": 5}, "head": None})
    {'training.lr': 0.001, 'training.steps': 5}
    """
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{name}.")
        elif value is not None:
            flat[f"{prefix}{name}"] = value
    return flat
