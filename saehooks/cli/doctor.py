"""`saehooks doctor`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from saehooks.cli.arguments import command

EPILOG = """\
examples:
  saehooks doctor
  saehooks doctor --json > doctor.json      to go with a bug report

Prints releases, releases that are known not to work together, which kernels serve and why no better ones, threads, and
whether the library keeps its promises here, on tiny models. Exit status 1 when something is wrong.
"""


def register(commands: Any) -> None:
    summary = "check this environment: releases, kernels, threads, and a self-check"
    parser = command(commands, "doctor", summary, EPILOG, run)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    from saehooks.doctor import examine
    from saehooks.show import terminal

    findings = examine()
    wrong = [one for one in findings if one.status == "wrong"]
    if arguments.json:
        print(json.dumps([one._asdict() for one in findings], indent=1))
    else:
        rows = [{"part": one.part, "name": one.name, "status": one.status, "detail": one.detail} for one in findings]
        print(terminal.render(terminal.table(rows)))
        print(f"{len(wrong)} wrong" if wrong else "nothing is wrong")
    return 1 if wrong else 0
