"""`saehooks doctor` and the known-bad pairs: what is wrong is named, with what to write."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch

import saehooks as sh
from saehooks import doctor, known_bad
from saehooks.cli.main import main
from saehooks.doctor import environment, self_check

PAIR = known_bad.TABLE[0]


@pytest.fixture
def bad_pair(monkeypatch):
    """An environment that holds a known-bad pair, as far as releases go."""
    releases = {"transformer-lens": (4, 3, 0), "transformers": (5, 24, 1)}
    monkeypatch.setattr(known_bad, "installed_release", releases.get)


def warned(call):
    """The known-bad warnings that a call shows under Python's default filter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        call()
    return [one for one in caught if one.category is known_bad.KnownBadWarning]


def attach_twice(model, site):
    """Two blocks on one model."""
    sae = sh.SAE(32, 64)
    for _ in range(2):
        with sh.read(model, sae, at=site):
            model(torch.tensor([[0, 5, 6]]))


@pytest.mark.parametrize(
    ("lens", "transformers", "bad"),
    [
        ((4, 3, 0), (5, 24, 0), True),
        ((3, 9, 0), (5, 24), True),
        ((4, 3, 0), (5, 23, 0), False),
        ((4, 3, 1), (5, 24, 0), False),  # a release that may have mended it
        ((2, 18, 0), (5, 24, 0), False),  # no bridge yet
        (None, (5, 24, 0), False),
    ],
)
def test_a_pair_is_bad_only_when_all_its_releases_are(monkeypatch, lens, transformers, bad):
    """Neighbours on either side are not accused."""
    releases = {"transformer-lens": lens, "transformers": transformers}
    monkeypatch.setattr(known_bad, "installed_release", releases.get)
    assert bool(known_bad.known_bad()) == bad


def test_attaching_to_a_bridge_of_a_bad_pair_warns_once(bad_pair, tiny_hf_bridge):
    """The warning names both releases and what to install."""
    found = warned(lambda: attach_twice(tiny_hf_bridge, "blocks.1.hook_resid_post"))
    assert len(found) == 1
    assert "transformer-lens" in str(found[0].message)
    assert 'write: pip install "transformers<5.24"' in str(found[0].message)


def test_other_models_of_that_environment_do_not_warn(bad_pair, tiny_hf, tiny_clip):
    """A plain Hugging Face model is right under the same releases."""
    assert warned(lambda: attach_twice(tiny_hf, "model.layers.1")) == []
    assert warned(lambda: sh.sites(tiny_clip)) == []


def test_extras_exclude_the_known_bad_pairs():
    """What `pip install saehooks[lens]` may install holds no pair of the table."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    asked = [Requirement(line) for line in requires("saehooks") or []]
    lens = {one.name: one.specifier for one in asked if one.marker and one.marker.evaluate({"extra": "lens"})}
    if "transformers" not in lens:
        pytest.skip("the installed saehooks is of an earlier release")
    for pair in known_bad.TABLE:
        firsts = {name: ".".join(map(str, span.first or (0,))) for name, span in pair.packages.items()}
        assert any(name in lens and not lens[name].contains(first) for name, first in firsts.items())


def test_doctor_finds_nothing_wrong_here(capsys):
    """In a right environment every line is ok or a note, in words and as JSON; exit status 0."""
    pair = known_bad.known_bad()
    assert main(["doctor", "--json"]) == bool(pair)
    findings = json.loads(capsys.readouterr().out)
    wrong = [one for one in findings if one["status"] == "wrong"]
    assert wrong == [] or pair
    assert {one["part"] for one in findings} == {"releases", "known-bad pairs", "kernels", "threads", "self-check"}
    checked = {one["name"] for one in findings if one["part"] == "self-check"}
    assert "kernels agree" in checked
    assert "transformers: the same tokens with a KV cache" in checked
    assert any(name.startswith("transformer-lens: ") for name in checked)


def test_a_bad_pair_makes_the_exit_status_1(bad_pair, monkeypatch, capsys):
    """It stands in the table, with what to write."""
    monkeypatch.setattr(doctor, "self_check_findings", list)
    assert main(["doctor"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 wrong" in shown
    assert "generates garbage" in shown


def test_the_self_check_sees_a_read_that_changes_something(monkeypatch):
    """A model whose second call differs is found out: the check can fail."""
    tiny = self_check.plain()
    assert self_check.read_is_identical(tiny) is None
    noise = iter((0.0, 1e-7))
    monkeypatch.setattr(tiny.model[2], "forward", lambda x: x.sum() * 0 + x + next(noise))
    assert "logits differ" in self_check.read_is_identical(tiny)


def test_the_self_check_sees_kernels_that_disagree(monkeypatch):
    """One wrong product of the kernels that serve the CPU is found out."""
    assert self_check.kernels_agree("cpu") is None
    right = self_check.kernels.spmm

    def wrong(values, support, table, **options):
        return right(values, support, table, **options) + (0.01 if not options else 0.0)

    monkeypatch.setattr(self_check.kernels, "spmm", wrong)
    assert "spmm differs" in self_check.kernels_agree("cpu")


def test_the_self_check_draws_no_random_numbers_of_the_users():
    """Random numbers drawn afterwards are what they would have been."""
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    self_check.self_check_findings()
    assert torch.equal(torch.rand(2), expected)


def test_missing_numba_is_a_note_that_says_what_to_write(monkeypatch):
    """Plain torch serves; results are the same."""
    found = environment.find_spec
    monkeypatch.setattr(environment, "find_spec", lambda name: None if name == "numba" else found(name))
    line = environment._cpu_kernels()
    assert (line.status, "pip install numba" in line.detail) == ("note", True)


NOWHERE = """
from numba.core import caching
caching.CacheImpl._locator_classes = []  # as where no folder can be written
from saehooks.doctor import environment
print(environment._cpu_kernels().detail)
"""


def test_a_cache_that_cannot_be_written_is_a_note():
    """Kernels are compiled anew in every process: slower, and said."""
    done = subprocess.run([sys.executable, "-c", NOWHERE], capture_output=True, text=True)
    assert "export NUMBA_CACHE_DIR" in done.stdout, done.stderr


def test_version(capsys):
    """`saehooks --version` prints the release and leaves."""
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("saehooks 0.")
