"""`saehooks sites`."""

from __future__ import annotations

import argparse
from typing import Any

from saehooks.cli.arguments import MODELS, command, open_model


def register(commands: Any) -> None:
    epilog = "examples:\n  saehooks sites smollm2 --find resid_post\n  saehooks sites tinyclip\n\n" + MODELS
    parser = command(commands, "sites", "list every place in a model where an SAE can be attached", epilog, run)
    parser.add_argument("model", help="the model, see below")
    parser.add_argument("--find", default="", help="only sites whose name or alias contains this")


def run(arguments: argparse.Namespace) -> None:
    import saehooks as sh

    table = sh.sites(open_model(arguments.model).model)
    print(table.find(arguments.find) if arguments.find else table)
