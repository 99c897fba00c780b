"""The entry point: `saehooks COMMAND ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from saehooks.cli import demo, doctor, fit, harvest, info, measure, sites
from saehooks.errors import SaehooksError

TOP = """\
examples:
  saehooks demo                                            the whole library on real models, as one HTML page
  saehooks sites smollm2 --find resid_post                 where an SAE can be attached
  saehooks fit --model smollm2 --at blocks.15.hook_resid_post --d-sae 4608 --out saes/mine
  saehooks info saes/mine                                  what an SAE is and how it was trained
  saehooks measure saes/mine --model smollm2               what splicing it in costs the model
  saehooks doctor                                          whether this environment is right; for bug reports

In Python:
  import saehooks as sh
  with sh.read(model, sh.load("saes/mine")) as trace:
      model(tokens)
"""

COMMANDS = (demo, fit, harvest, measure, sites, info, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for an error that the user can fix)."""
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


class Version(argparse.Action):
    """Looks the release up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        from importlib.metadata import version

        print(f"saehooks {version('saehooks')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saehooks",
        description="Attach sparse autoencoders to language models and CLIP: read, edit, measure, train.",
        epilog=TOP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the release and leave")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for one in COMMANDS:
        one.register(commands)
    return parser
