"""The planning page: arithmetic by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

from scale import NEWTON, Machine, Plan  # noqa: E402


def test_bytes_of_a_million_latents_by_hand():
    """M = 2^20, d = 4096, 8192 rows, 8 ranks: 268 MB of rows for us, 17 GB of gradients data-parallel."""
    plan = Plan(2**20, 4096, 8192, 64, 8)
    rows = 2 * 8192 * 4096 * 4
    assert plan.sent("top-k, split latents") == rows + 8192 * 64 * 4
    assert plan.sent("sparsemax, split latents") == rows + 8192 * (NEWTON * 16 + 8)
    assert plan.sent("data-parallel") == 2**20 * 4096 * 4
    assert plan.sent("torch.topk of a DTensor") == rows + 8192 * 2**17 * 4
    assert plan.sent("top-k by bisection (llamascopium)") == rows + 8192 * 25 * 12
    assert plan.scores_held("top-k by bisection (llamascopium)") == 8192 * 2**17 * 4
    assert plan.scores_held("sparsemax, split latents") == 0
    assert plan.sent("data-parallel") / plan.sent("sparsemax, split latents") == pytest.approx(63.8, abs=0.2)


def test_time_and_memory_by_hand():
    """Scores are a product of rows and own latents; memory is the tables three times, and a little."""
    plan, machine = Plan(2**20, 4096, 8192, 64, 8), Machine(400, 2500, 200, 80)
    assert plan.seconds(machine)["scores"] == pytest.approx(2 * 8192 * 4096 * 2**17 / 400e12)
    assert plan.seconds(machine)["update"] == pytest.approx(7 * 4 * 2**17 * 4096 / 2500e9)
    buffer = 32_768 * 4096 * 4
    assert 3 * 4 * 2**17 * 4096 + buffer < plan.memory() < 1.25 * 3 * 4 * 2**17 * 4096


def test_the_page_is_printed():
    """It runs by itself, and says where more ranks stop paying."""
    done = subprocess.run([sys.executable, str(RECIPES / "scale.py")], capture_output=True, text=True, check=True)
    assert "1,048,576 latents" in done.stdout
    assert "more than half of a step is sending" in done.stdout
