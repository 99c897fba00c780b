"""The benchmarks run from end to end on the GPU's code without a GPU, and judge what was measured."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saehooks.kernels import backend

pytest.importorskip("triton")

BENCHMARK = Path(__file__).parents[2] / "recipes" / "benchmark"
SECTIONS = {
    "selection": ["exact", "selection"], "encode": ["encode"], "train_step": ["train step"],
    "attach": ["attach", "generate"], "sweep": ["launch shapes"],
}  # fmt: skip


def in_this_process(command, timeout):
    """What `subprocess.run` does with a Python script, but here, where everything is imported."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", command[1:])
        patched.setattr(backend, "FORCED", backend.FORCED)
        runpy.run_path(command[1], run_name="__main__")
    return subprocess.CompletedProcess(command, 0)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is chosen when Triton is imported")
def test_the_benchmarks_run_in_the_interpreter(tmp_path, monkeypatch, capsys):
    """Every section runs at toy size and is exact; no time is reported, since none was measured on a GPU."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARK), *sys.path])
    import run

    monkeypatch.setattr(run.subprocess, "run", in_this_process)
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "interpret", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 0
    assert "nothing was timed" in capsys.readouterr().out
    for name, wanted in SECTIONS.items():
        found = json.loads((tmp_path / f"{name}.json").read_text())["sections"]
        assert [section for section in wanted if not found.get(section)] == []
        rows = [row for section in wanted if section != "exact" for row in found[section]]
        assert [job for row in rows for job, times in row["times"].items() if times.get("ms")] == []
        assert [times["note"] for row in rows for times in row["times"].values() if "note" in times] == []


def test_compiling_first_runs_every_job_and_writes_nothing(tmp_path, monkeypatch):
    """In processes of their own, side by side; one that cannot run is named and stops none of the others."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARK), *sys.path])
    import run

    monkeypatch.setattr(run, "SCRIPTS", ("selection", "encode", "no_such_script"))
    assert run.compile_kernels("interpret", ["--out", str(tmp_path)], 300) == ["no_such_script"]
    assert not list(tmp_path.iterdir())
    assert run.compile_kernels("interpret", ["--out", str(tmp_path)], 0) == ["selection", "encode", "no_such_script"]


def test_what_there_is_no_time_for_is_left_out_with_a_line(tmp_path):
    """Without time no script begins, and each is named."""
    command = [sys.executable, str(BENCHMARK / "run.py"), "--minutes", "0", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "train_step: left out, no time left" in done.stdout
    assert not list(tmp_path.iterdir())


def test_goals_are_judged_by_ratios_of_the_cases_they_are_about(monkeypatch):
    """A miss is called one; smaller dictionaries than a goal speaks of are left alone."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARK), *sys.path])
    from run import judged

    def row(d_sae, **ratios):
        case = {"rows": 512, "d_sae": d_sae, "d_in": 576, "support": 64}
        return case | {"times": {name: {"ratio": ratio} for name, ratio in ratios.items()}}

    lines = judged({"encode": [row(24576, sparsemax=0.4), row(49152, sparsemax=0.9), row(3072, sparsemax=9.0)]}, "cpu")
    assert [line.rsplit(": ", 1)[1] for line in lines] == ["met", "NOT MET"]
    assert judged({"encode": [row(24576, sparsemax=None)]}, "cpu") == []
    over = {"selection": [row(24576, **{"saehooks sparsemax": 0.1, "torch.topk": 0.5, "amax": 0.2})]}
    assert [line.split(",")[0] for line in judged(over, "cuda")] == ["selection / torch.topk", "selection / amax"]
    assert [line.rsplit(": ", 1)[1] for line in judged(over, "cuda")] == ["met", "met"]
