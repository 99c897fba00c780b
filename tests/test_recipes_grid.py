"""The recipes about the grid: arithmetic by hand, tables and pictures from made-up rows, and the short ones run."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import pytest
import torch

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

import compare_architectures as compare  # noqa: E402
import stability  # noqa: E402
from compare_table import at_same_l0, beside_topk, draw, write_tables  # noqa: E402


def made_up():
    """One row of results for each arm, TopK's on a straight line of slope -1/2 in logarithms."""
    rows = []
    for i, arm in enumerate(compare.ARMS):
        l0 = {0: 16.0, 1: 32.0, 2: 64.0}.get(i, 20.0 + i)
        rows.append(
            {
                "at": "a site",
                "seed": 0,
                "arm": arm,
                "d_sae": 64,
                "l0": l0,
                "nmse": l0**-0.5,
                "token_nmse": 2 / l0,
                "steps": 3,
            }
        )
        rows[-1]["ce_degradation"] = 1 / l0
        rows[-1] |= {"lr": 1e-3, "dead": 2}
        rows[-1] |= {"l0_q05": l0 - 5, "l0_median": l0, "l0_q95": l0 + 9}
    return rows


def test_topk_at_the_same_l0():
    """Between and beyond its three arms TopK's NMSE follows a straight line in logarithms."""
    rows = made_up()
    rows[5]["l0"] = 256.0
    at_same_l0(rows)
    for row in rows:
        assert row["topk_nmse"] == pytest.approx(row["l0"] ** -0.5)
        assert row["topk_token_nmse"] == pytest.approx(2 / row["l0"])


def test_tables_and_picture(tmp_path):
    """CSV, Markdown and a picture come out of results with figures missing."""
    pytest.importorskip("matplotlib")
    rows = made_up()
    at_same_l0(rows)
    write_tables(rows, {"model": "none"}, tmp_path)
    draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "table.csv").read_text().count("\n") == len(rows) + 1
    assert "| a site | 64 | 0 | sparsemax |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_topk_of_the_same_site_size_and_seed():
    """Another seed's TopK says nothing about this one's arms."""
    rows = made_up()
    at_same_l0(rows := [*rows, *({**row, "seed": 1, "nmse": 2 * row["nmse"]} for row in rows)])
    for row in rows:
        assert row["topk_nmse"] == pytest.approx((1 + row["seed"]) * row["l0"] ** -0.5)


def test_what_a_reader_looks_for_first():
    """Beside TopK at the same L0, mean over seeds: twice its error at one and as much at the other are half more."""
    one = made_up()
    other = [{**row, "seed": 1, "nmse": row["nmse"] * (2 if row["arm"] == "sparsemax" else 1)} for row in one]
    at_same_l0(rows := [*one, *other])
    head, _, *lines = (line.split(" | ") for line in beside_topk(rows).splitlines())
    found = {line[head.index("arm")]: line for line in lines}
    assert found["sparsemax"][3] == "2"
    assert found["sparsemax"][-1].strip(" |") == "+50%"
    assert found["jumprelu"][-1].strip(" |") in ("+0%", "-0%")


def test_each_arm_keeps_the_rate_that_is_best_on_validation_text(tmp_path):
    """A rate at which nothing is learned is never kept, and a run that goes on does not ask again."""
    torch.manual_seed(0)
    rows = torch.relu(torch.randn(256, 24)) @ torch.randn(24, 16)
    names = ["topk, k/2", "topk", "topk, 2k", "sparsemax"]
    given = {"batch_size": 64, "seed": 0, "k": 4, "lr": 1e-2, "checkpoint_every": 99, "out": tmp_path}
    options = argparse.Namespace(**given, d_sae=[32], arms=names, rates=[1.0, 1e-6])
    assert compare.best_rates(options, rows.half(), rows, 20) == dict.fromkeys(names, 1.0)
    options.rates = [7.0]
    assert compare.best_rates(options, rows.half(), rows, 20) == dict.fromkeys(names, 1.0)


def test_every_arm_sees_the_same_batches_and_goes_on_where_it_was(tmp_path):
    """Batches depend on the step alone; a run cut after some steps ends as an uninterrupted one."""
    torch.manual_seed(0)
    rows = torch.randn(64, 16).half()
    options = argparse.Namespace(batch_size=16, seed=0, k=4, lr=1e-3, checkpoint_every=2, out=tmp_path / "one")
    seen = torch.cat([compare.batch_of(rows, step, options) for step in range(4)])
    assert torch.equal(seen.sort(0).values, rows.float().sort(0).values)

    def run(out, *until):
        for steps in until:
            options.out = out
            names = ["topk", "relu", "sparsemax"]
            arms = [compare.make_arm(name, 32, 1.0, 6, rows[:32].float(), options) for name in names]
            compare.train(arms, rows, steps, options)
        return {name: tensor for arm in arms for name, tensor in arm.trainer.sae.state_dict().items()}

    whole, cut = run(tmp_path / "one", 6), run(tmp_path / "two", 4, 6)
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


def test_latents_are_found_again_in_another_order():
    """An SAE with its latents shuffled has all of them; one with other directions has none."""
    from saehooks import presets

    torch.manual_seed(0)
    one, rows = presets.topk_sae(16, 40, k=8).frozen(), torch.randn(200, 16)
    order = torch.randperm(40)
    shuffled = presets.topk_sae(16, 40, k=8)
    state = {name: t[order] if t.shape[:1] == (40,) else t for name, t in one.state_dict().items()}
    shuffled.load_state_dict({**state, "dictionary.W_enc": one.dictionary.W_enc.detach()[:, order]})
    again = stability.found_again(one, shuffled.frozen(), rows)
    assert (again["by direction"], again["by firing"]) == (1.0, 1.0)
    other = stability.found_again(one, presets.topk_sae(16, 40, k=8).frozen(), rows)
    assert other["by direction"] < 0.5
    assert other["by firing"] < 0.2


def test_inputs_nobody_trains_on():
    """Each has the size and the covariance its name says."""
    rows = torch.randn(4000, 8) @ torch.diag(torch.arange(1.0, 9.0)) + 3
    found = stability.extremes(rows, rows)
    assert all(x.shape == (256, 8) for x in found.values())
    median = rows.norm(dim=1).median()
    assert torch.allclose(found["noise of the median norm"].norm(dim=1), median.expand(256))
    assert torch.allclose(found["one constant"].norm(dim=1), median.expand(256))
    spread = found["noise of the data's covariance"].std(0) / rows.std(0)
    assert bool(((spread > 0.8) & (spread < 1.25)).all())


def test_load_published_runs(tmp_path, monkeypatch, capsys):
    """The demo writes a file as the authors do, reads it and saves a folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["load_published.py", "--demo"])
    runpy.run_path(str(RECIPES / "load_published.py"), run_name="__main__")
    assert "visual.blocks.10.hook_resid_post" in capsys.readouterr().out
    assert (tmp_path / "out/published/folder/cfg.json").is_file()
