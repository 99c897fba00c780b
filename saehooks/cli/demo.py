"""`saehooks demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from saehooks.cli.arguments import command


def register(commands: Any) -> None:
    parser = command(
        commands,
        "demo",
        "show the library at work on SmolLM2 and a small CLIP, as one HTML page",
        "example:\n  saehooks demo --out demo.html\n\nTakes under five minutes on two CPU cores and fetches nothing.",
        run,
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo.html"), help="the page to write (%(default)s)")
    parser.add_argument("--sae", type=Path, help="another SAE for SmolLM2 than the packaged one")
    parser.add_argument("--clip-sae", type=Path, help="another SAE for the small CLIP than the packaged one")
    parser.add_argument(
        "--train-seconds", type=float, default=60.0, help="how long to train the fresh SAE (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> None:
    from saehooks.demo.language import Budget
    from saehooks.demo.run import run as run_demo

    budget = Budget(train_seconds=arguments.train_seconds)
    run_demo(arguments.out, sae=arguments.sae, clip_sae=arguments.clip_sae, budget=budget)
