"""Reads lock files: what an environment lacks of one, and whether one still answers what pyproject.toml asks for.

python .ci/check_lock.py satisfied LOCK    exit status 1 where an extra of saehooks asks for what LOCK does not give
python .ci/check_lock.py differing LOCK    the lines of LOCK that this environment has not, or has in another release
python .ci/check_lock.py newer LOCK        what this environment has in a later release than LOCK, in words
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

EXTRAS = ("", "test", "lint", "all", "demo", "lens", "clip", "plot")


def locked(path: str) -> dict[str, Requirement]:
    """The releases that a lock has for this Python on this system, by package."""
    lines = (line.split("#")[0].strip() for line in Path(path).read_text().splitlines())
    asked = (Requirement(line) for line in lines if line)
    return {canonicalize_name(each.name): each for each in asked if each.marker is None or each.marker.evaluate()}


def release(requirement: Requirement) -> Version:
    """The release that ``name==release`` names."""
    return Version(next(iter(requirement.specifier)).version)


def installed(name: str) -> Version | None:
    """The release of a package in this environment; None without it."""
    try:
        return Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def unsatisfied(lock: dict[str, Requirement]) -> list[str]:
    """Each requirement of saehooks, extras included, that no line of the lock satisfies."""
    found = []
    for asked in map(Requirement, metadata.requires("saehooks") or []):
        name = canonicalize_name(asked.name)
        applies = asked.marker is None or any(asked.marker.evaluate({"extra": extra}) for extra in EXTRAS)
        if name == "saehooks" or not applies:
            continue
        if name not in lock:
            found.append(f"{name} is not in it")
        elif not asked.specifier.contains(release(lock[name]), prereleases=True):
            found.append(f"it has {lock[name].name} {release(lock[name])}, not {asked.specifier}")
    return sorted(set(found))


def differing(lock: dict[str, Requirement]) -> list[str]:
    """The lines of the lock that this environment does not hold."""
    return [f"{asked.name}=={release(asked)}" for name, asked in lock.items() if installed(name) != release(asked)]


def newer(lock: dict[str, Requirement]) -> list[str]:
    """What this environment has in a later release than the lock."""
    pairs = ((name, installed(name), release(asked)) for name, asked in lock.items())
    return [
        f"{name} {mine} (lock: {theirs})"
        for name, mine, theirs in pairs
        if mine and mine > theirs and not name.startswith(("nvidia-", "cuda-"))  # they come with torch
    ]


def main() -> int:
    """Run one of the three commands above."""
    what, path = sys.argv[1:]
    lock = locked(path)
    if what == "satisfied":
        faults = unsatisfied(lock)
        if faults:
            print(f"saehooks: {path} is stale: {'; '.join(faults)}; write: make lock", file=sys.stderr)
        return bool(faults)
    print("\n".join(differing(lock) if what == "differing" else newer(lock)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
