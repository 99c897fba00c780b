"""The GPU benchmark runs from end to end without a GPU, and without what a bare GPU machine lacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]

BARE = """
import runpy, sys
LACKS = {"transformer_lens", "open_clip", "transformers", "numba", "matplotlib", "rich", "safetensors"}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in LACKS:
            raise ImportError(f"{name} is not on this machine")
missing = Missing()
sys.meta_path.insert(0, missing)
sys.argv = sys.argv[1:]
sys.path.insert(0, str(__import__("pathlib").Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""

TIMED = ("peaks", "profile", "kernels", "select", "encode", "decode", "step", "others", "trainer", "attach", "generate")
SECTIONS = ("exact", *TIMED, "select plans", "product plans")


@pytest.fixture
def bench(tmp_path):
    """Runs the benchmark in a copy of what it needs; gives what it found, and its report."""
    for part in ("saehooks", "recipes/benchmark"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("assets", "results", "__pycache__"))

    def run(*options: str) -> tuple[dict, str]:
        script = tmp_path / "recipes" / "benchmark" / "gpu.py"
        command = [sys.executable, "-c", BARE, str(script), "--interpret", "--out", str(tmp_path), *options]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert not list(tmp_path.glob("*.svg"))
        return json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()

    return run


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_the_interpreter_on_a_bare_machine(bench):
    """Every section runs at toy size and is exact; no time is reported, since none was measured on a GPU."""
    found, page = bench()
    assert [name for name in SECTIONS if not found.get(name)] == []
    assert (found["failed"], found["uncaptured"], found["skipped"]) == ([], [], [])
    for section in SECTIONS:
        for row in found[section]:
            assert [key for key, value in row.items() if value and (key.endswith((" ms", "/s")) or key == "ms")] == []
    assert all(row["same"] for name in ("select plans", "product plans") for row in found[name])
    assert {row["met"] for row in found["goals"]} == {"not measured"}
    assert "**nothing was timed**" in page
    assert "UNWRITTEN_FROM`: not measured" in page
    notes = {row["who"]: row.get("note") for row in found["others"]}
    assert notes["sparsify package"] in (None, "package not installed")


def test_what_there_is_no_time_for_is_left_out_with_a_line(bench):
    """Without time no task begins, and the report says which."""
    found, page = bench("--minutes", "0")
    assert not any(name in found for name in SECTIONS)
    assert len(found["skipped"]) >= 10
    assert "stepped, 64 latents x 16: no time left" in page
