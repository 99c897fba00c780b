"""The entry point: `saehooks COMMAND ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from saehooks.cli import demo, fit, info, measure, sites
from saehooks.errors import SaehooksError

TOP = """\
examples:
  saehooks demo                                            the whole library on real models, as one HTML page
  saehooks sites smollm2 --find resid_post                 where an SAE can be attached
  saehooks fit --model smollm2 --at blocks.15.hook_resid_post --d-sae 4608 --out saes/mine
  saehooks info saes/mine                                  what an SAE is and how it was trained
  saehooks measure saes/mine --model smollm2               what splicing it in costs the model

In Python:
  import saehooks as sh
  with sh.read(model, sh.load("saes/mine")) as trace:
      model(tokens)
"""

COMMANDS = (demo, fit, measure, sites, info)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for an error that the user can mend)."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except SaehooksError as error:
        print(f"saehooks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"saehooks: {interruption or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        sys.stderr.close()
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saehooks",
        description="Attach sparse autoencoders to language models and CLIP: read, edit, measure, train.",
        epilog=TOP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for one in COMMANDS:
        one.register(commands)
    return parser
