"""The environments are locked: exact releases that answer what saehooks asks for, told when they no longer do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INPUTS = ("known_good.txt", "newest.txt")
LOCKS = sorted(path for path in (ROOT / ".ci" / "locks").glob("*.txt") if path.name not in INPUTS)


def check(*arguments):
    """What `.ci/check_lock.py` says in this environment."""
    command = [sys.executable, ROOT / ".ci" / "check_lock.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_names_one_release_a_package_and_python(lock):
    """Every line of a lock is ``name==release``, and no package is named twice without a marker."""
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 40
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9._-]+==\S+( ; .+)?", line)] == []
    plain = [line.split("==")[0] for line in lines if " ; " not in line]
    assert len(plain) == len(set(plain))


def test_the_lock_answers_what_every_extra_asks_for():
    """The lock is not stale: `make lock` has run since the dependencies last changed."""
    answer = check("satisfied", ".ci/locks/main.txt")
    assert answer.returncode == 0, answer.stderr


def test_a_stale_lock_says_what_to_write(tmp_path):
    """A package that is missing, or that is too old, is named, with the command that mends the lock."""
    text = (ROOT / ".ci" / "locks" / "main.txt").read_text()
    text = re.sub(r"(?m)^gguf==.*\n", "", text)
    stale = tmp_path / "main.txt"
    stale.write_text(re.sub(r"(?m)^safetensors==.*$", "safetensors==0.3.0", text))
    answer = check("satisfied", stale)
    assert answer.returncode == 1
    assert "gguf is not in it" in answer.stderr
    assert "it has safetensors 0.3.0, not >=0.4" in answer.stderr
    assert "make lock" in answer.stderr


def test_only_what_differs_is_installed_beside_an_environment(tmp_path):
    """The legacy environments get the lines that this one lacks or has in another release, and no more."""
    from importlib.metadata import version

    lock = tmp_path / "lock.txt"
    lines = [f"pytest=={version('pytest')}", "numpy==1.26.4", "no-such-package==3", "rich==1 ; sys_platform == 'none'"]
    lock.write_text("\n".join(lines))
    assert check("differing", lock).stdout.split() == ["numpy==1.26.4", "no-such-package==3"]
    lock.write_text("pytest==1.0\nnumpy==99.0\n")
    newer = check("newer", lock).stdout
    assert newer.startswith("pytest ")
    assert "numpy" not in newer


def test_python_3_9_is_refused_with_what_to_write(tmp_path):
    """Set-up under a Python that is too old names the version needed and how to choose another."""
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.18"\nexit 1\n')  # what a check of 3.9 answers
    old.chmod(0o755)
    answer = subprocess.run(
        [ROOT / ".ci" / "environment", tmp_path / "env", "main"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(old)},
    )
    assert answer.returncode == 1
    assert "needs Python >= 3.10" in answer.stderr
    assert "make PYTHON=python3.11" in answer.stderr


def test_the_newest_releases_are_tried_on_tests_that_are_there():
    """pytest runs nothing at all where one of the paths it is given does not exist."""
    script = ROOT / ".ci" / "newest"
    if not script.is_file():
        pytest.skip("not a checkout")
    patterns = re.findall(r"tests/[\w./*\[\]]+", script.read_text(encoding="utf-8"))
    assert len(patterns) > 5
    assert [pattern for pattern in patterns if not list(ROOT.glob(pattern))] == []
