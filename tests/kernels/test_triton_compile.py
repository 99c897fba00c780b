"""Every Triton kernel compiles for the GPUs it is meant for, without one, and keeps its values in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_gpu_and_do_not_spill(capability):
    """Ampere and Hopper: registers stay under the limit of a thread, nothing is spilled to memory."""
    script = Path(__file__).with_name("compile_triton.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script, str(capability)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) >= 20
    print(*rows, sep="\n")
    assert [row for row in rows if row["spilled"]] == []
    assert max(row["registers"] for row in rows) < 255
    streaming = ("collect", "batch maxima", "batch tally", "sddmm", "spmm", "adam", "scores_above")
    narrow = [row["kernel"] for row in rows if row["kernel"].startswith(streaming) and not row["wide_loads"]]
    assert narrow == [], "rows of 16-byte multiples are read 16 bytes at a time"
    assert capability < 90 or any(row["wgmma"] for row in rows), "the product uses the tensor cores of its GPU"
