"""The GPU benchmark runs from end to end without a GPU, and without what a bare GPU machine lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmark" / "gpu.py"

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
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_the_interpreter_on_a_bare_machine(tmp_path):
    """Every section runs at toy size and is exact; no time is reported, since none was measured on a GPU."""
    command = [sys.executable, "-c", BARE, str(SCRIPT), "--interpret", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {"exact", "select", "encode", "decode", "step", "attach"} <= set(found)
    assert all(found[name] for name in ("exact", "select", "encode", "decode", "step", "attach"))
    assert not found["skipped"]
    for section in ("select", "encode", "decode", "step", "attach"):
        for row in found[section]:
            assert all(value is None for key, value in row.items() if key.endswith((" ms", "/s", "MB")))
    assert "nothing was timed" in (tmp_path / "gpu.md").read_text()
    assert not list(tmp_path.glob("*.svg"))
