"""The GPU benchmark's verdicts and what it leaves out, on numbers made up here: none was measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = str(Path(__file__).parents[2] / "recipes" / "benchmark")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setattr(sys, "path", [BENCHMARK, *sys.path])


def found_with(select):
    """A run that measured selection and a profile of two parts."""
    profile = [
        {"part": "selection: collect", "ms": 0.5, "floor ms": 0.2, "/ floor": 2.5},
        {"part": "selection: finish and fill", "ms": 0.1, "floor ms": 0.09, "/ floor": 1.1},
        {"part": "decode: spmm", "ms": 9.0, "floor ms": 0.1, "/ floor": 90.0},
        {"part": "the whole step, as a CUDA graph", "ms": 9.6},
    ]
    reference = {"d_sae": 49_152, "d_in": 768, "support": 64}
    return {"reference": reference, "select": select, "profile": profile, "rows": 4096}


def row(d_sae, support, topk, amax):
    return {"d_sae": d_sae, "d_in": 768, "support": support, "/ topk": topk, "/ amax": amax}


def test_a_goal_is_judged_at_the_reference_size_and_counted_elsewhere():
    """The reference row decides; the other rows are counted, those that were not measured are not."""
    from gpu_goals import judged

    rows = [row(49_152, 64, 0.2, 1.5), row(49_152, 200, 0.4, 1.2), row(3_072, 64, 0.3, 1.1), row(3_072, 16, None, None)]
    topk, amax, *others = judged(found_with(rows))
    assert (topk["wanted"], topk["measured"], topk["met"]) == ("<= 0.35", 0.2, "yes")
    assert topk["elsewhere"] == "met in 1 of 2, 0.3 to 0.4"
    assert (amax["measured"], amax["met"], amax["elsewhere"]) == (1.5, "NO", "met in 2 of 2, 1.1 to 1.2")
    assert {other["met"] for other in others} == {"not measured"}


def test_a_missed_goal_names_the_parts_that_make_it_up_and_what_is_next():
    """Only the selection's own parts explain a selection, the one furthest from its floor first."""
    from gpu_goals import explained

    lines = explained(found_with([row(49_152, 64, 0.2, 1.5)]))
    assert lines[0] == "- **sparsemax on given scores / torch.amax**: 1.5, wanted <= 1.3."
    assert lines[1].startswith(
        "    - selection: collect: 0.500 ms, 2.50 of its floor 0.200. Next: see the select plans"
    )
    assert [line for line in lines if "decode" in line] == []
    assert explained(found_with([row(49_152, 64, 0.2, 1.2)])) == []


@pytest.mark.parametrize(
    ("written", "unwritten", "overflowed", "said"),
    [
        ([3.0, 2.0], [1.0, 1.0], False, "set it to 400"),
        ([3.0, 0.5], [1.0, 1.0], False, "set it to 4000"),
        ([0.5, 0.5], [1.0, 1.0], False, "leave it None"),
        ([3.0, 3.0], [1.0, 1.0], True, "leave it None"),
        ([None, None], [None, None], False, "not measured"),
    ],
)
def test_the_advice_on_writing_scores_holds_at_every_measured_size(written, unwritten, overflowed, said):
    """From the advised size on, every size was faster unwritten; lost candidates count against it."""
    pytest.importorskip("triton")
    from gpu_sweep import advice

    rows = [
        {"d_sae": d_sae, "written ms": one, "unwritten ms": other, "unwritten overflowed": overflowed}
        for d_sae, one, other in zip((1000, 100), written, unwritten, strict=True)
    ]
    assert said in advice({"rows": 4, "encode": rows})[-1]


def test_a_job_that_does_not_fit_is_left_out_and_one_that_fails_is_reported():
    """Neither stops the run; a peer's error is no failure of ours; what the device cannot survive stops it."""
    from gpu_clock import Broken, Clock

    def broken(message):
        raise RuntimeError(message)

    clock = Clock(torch.device("cpu"), interpreted=True, memory_gb=16)
    assert clock.tried("small", lambda: 3, gigabytes=15) == 3
    assert clock.tried("large", lambda: 3, gigabytes=17) is None
    assert clock.tried("peer", lambda: broken("no kernel"), theirs=True) is None
    assert clock.skipped == ["large: needs about 17 GB, 16 GB are free", "peer: RuntimeError: no kernel"]
    assert clock.tried("ours", lambda: broken("wrong\nmore")) is None
    assert clock.failed == ["ours: RuntimeError: wrong"]
    with pytest.raises(Broken, match="last: RuntimeError: CUDA error"):
        clock.tried("outer", lambda: clock.tried("last", lambda: broken("CUDA error: an illegal memory access")))


def test_the_largest_case_is_known_to_need_more_than_a_small_gpu_has():
    """262,144 latents of width 2,048: at least two tables with their gradients and Adam's means, and dense codes."""
    pytest.importorskip("triton")
    from gpu_others import their_gb
    from gpu_step import our_gb

    sizes = 4_096, 262_144, 2_048
    table, scores = 4e-9 * 262_144 * 2_048, 4e-9 * 4_096 * 262_144
    assert their_gb(*sizes) > 8 * table + 4 * scores > 24
    assert 4 * table + scores < our_gb(*sizes) < 40
