"""The command line: one file per command, thin over the library."""

from saehooks.cli.main import main

__all__ = ["main"]
