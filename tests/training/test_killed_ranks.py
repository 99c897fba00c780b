"""A rank that is killed ends the others with a clear message, and the restarted training ends with the same weights."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import saehooks as sh
from saehooks.storage import open_safetensors

pytestmark = pytest.mark.slow
RUNNER = Path(__file__).with_name("killed_ranks.py")
KILLS = [
    {"victim": 1, "moment": "reduce", "count": 5},  # amid a step, before any checkpoint
    {"victim": 0, "moment": "fsync", "count": 2},  # while its part of the second checkpoint is written
    {"victim": 1, "moment": "fsync", "count": 1},
    {"victim": 0, "moment": "replace", "count": 1},  # before a whole checkpoint takes the place of the old one
    {"victim": 1, "moment": "reduce", "count": 31},
]


def trained(folder):
    """What became of a training, of one killed five times, and of that one started once more."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RUNNER), str(folder), json.dumps(KILLS)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            return json.loads(process.communicate(timeout=900)[0])
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and gloo over the loopback device")
def test_a_killed_rank_ends_the_others_and_loses_nothing(tmp_path):
    """Killed in a step and while checkpoints are written: the other says so, and started again nothing is missing."""
    whole, *killed, last = trained(tmp_path)
    assert whole["statuses"] == last["statuses"] == [0, 0], (whole, last)
    reached = []
    for number, (kill, found) in enumerate(zip(KILLS, killed, strict=True), 1):
        survivor = 1 - kill["victim"]
        assert found["statuses"][kill["victim"]] == -9
        assert found["statuses"][survivor] == 1
        assert "RankError: rank" in found["said"][survivor]
        assert "another process ended" in found["said"][survivor]
        assert "resume=True" in found["said"][survivor]
        file = tmp_path / f"checkpoint.{number}"
        reached.append(open_safetensors(file).config["counters"]["steps"] if file.exists() else 0)
    assert reached == sorted(reached)
    assert reached[0] == 0 < reached[-1] < 20
    assert not list((tmp_path / "killed").glob(".*")), "what a killed process left half written stays"
    saved, wanted = (sh.load(tmp_path / name).state_dict() for name in ("killed", "whole"))
    assert all(torch.equal(value, saved[name]) for name, value in wanted.items())
