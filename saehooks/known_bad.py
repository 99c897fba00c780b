"""Releases of other packages that do not work together, and what to install instead."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import NamedTuple

Release = tuple[int, ...]


class Span(NamedTuple):
    """A range of releases of one package; a bound that is None is open."""

    first: Release | None = None
    last: Release | None = None
    """The last release known to be bad, itself included."""

    def holds(self, release: Release) -> bool:
        """Whether a release lies in the range.

        >>> Span((5, 24)).holds((5, 24, 0)), Span((3,), (4, 3, 0)).holds((4, 3, 1))
        (True, False)
        """
        return (self.first is None or release >= self.first) and (self.last is None or release <= self.last)


class KnownBad(NamedTuple):
    """Packages that give wrong results in certain releases of all of them together."""

    packages: Mapping[str, Span]
    """The range of each package, by its name in the package index."""
    effect: str
    """What goes wrong."""
    remedy: str
    """The command that mends it."""

    def sentence(self) -> str:
        """What is installed, what goes wrong, and what to write."""
        named = " with ".join(f"{name} {metadata.version(name)}" for name in self.packages)
        return f"{named}: {self.effect}; write: {self.remedy}"


TABLE = (
    # Tried: 4.0.0 and 4.3.0 with 5.23.0 (right) and 5.24.0 (wrong); 3.9.0 fails alike in its own tests.
    # HookedTransformer has a cache of its own.
    KnownBad(
        {"transformer-lens": Span((3,), (4, 3, 0)), "transformers": Span((5, 24))},
        "a TransformerBridge loses its KV cache and generates garbage, with saehooks or without",
        'pip install "transformers<5.24"',
    ),
)
"""Every known pair. Extras in pyproject.toml exclude them."""


@cache
def installed_release(package: str) -> Release | None:
    """The release of a package, as numbers; None without it.

    >>> installed_release("no-such-package")
    """
    try:
        return parse(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def parse(version: str) -> Release:
    """The numbers of a version.

    >>> parse("2.14.1+cu130"), parse("5.24.0rc1"), parse("4.3.0.dev3")
    ((2, 14, 1), (5, 24, 0), (4, 3, 0))
    """
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = part[: next((at for at, one in enumerate(part) if not one.isdigit()), len(part))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def known_bad() -> list[KnownBad]:
    """The known-bad pairs of this environment."""
    found = []
    for pair in TABLE:
        releases = {name: installed_release(name) for name in pair.packages}
        if all(release and pair.packages[name].holds(release) for name, release in releases.items()):
            found.append(pair)
    return found


class KnownBadWarning(UserWarning):
    """Releases of other packages are installed that are known not to work together."""


def warn_of_known_bad(packages: tuple[str, ...]) -> None:
    """Warn of a known-bad pair whose packages are all among those a model runs on; Python shows it once."""
    for pair in known_bad():
        if set(pair.packages) <= set(packages):
            warnings.warn(pair.sentence(), KnownBadWarning, stacklevel=1)
