"""On a device that has no float64, as Apple's have none, everything runs and gives what the CPU gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("torch.utils.backend_registration")

DEVICE = Path(__file__).parent / "narrow_device.py"


@pytest.mark.parametrize(("part", "count"), [("cells", 27), ("verbs", 9)])
def test_a_device_without_float64_gives_what_the_cpu_gives(part, count):
    """No tensor is made there in float64, none of two devices meet, and every figure is the CPU's."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch knows no devices written in Python")
    done = subprocess.run([sys.executable, str(DEVICE), part], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == count
    for name, here, there in found:
        assert flat(there) == pytest.approx(flat(here), rel=2e-4, abs=2e-5, nan_ok=True), name


def flat(value):
    """All numbers of a nest of lists."""
    return [one for part in value for one in flat(part)] if isinstance(value, list) else [float(value)]
