"""Metrics by hand, and the meter against the whole."""

from __future__ import annotations

import math

import pytest
import torch

import saehooks as sh
from saehooks import metrics
from saehooks.errors import WidthError

X = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
RECONS = torch.tensor([[1.0, 1.0], [2.0, 0.0]])


def test_errors_by_hand():
    """2 of squared error, 10 of energy, 2 of variance."""
    assert metrics.nmse(X, RECONS) == pytest.approx(0.2)
    assert metrics.token_nmse(X, RECONS) == pytest.approx((1 + 1 / 9) / 2)
    assert metrics.token_nmse(torch.cat([X, 0 * X]), torch.cat([RECONS, X])) == pytest.approx((1 + 1 / 9) / 2)
    assert metrics.fvu(X, RECONS) == pytest.approx(1.0)
    assert metrics.explained_variance(X, RECONS) == pytest.approx(0.0)
    assert metrics.nmse(X, X) == 0


def test_a_broken_row_shows():
    """NaN in, NaN out: never a silent zero."""
    assert math.isnan(metrics.nmse(X, RECONS * float("nan")))


def test_shapes_must_agree():
    """Another shape is an error, not a broadcast."""
    with pytest.raises(WidthError):
        metrics.nmse(X, RECONS[:1])


def test_counts_by_hand():
    """L0 with quantiles, density and dead latents of two rows over three latents."""
    codes = sh.Codes.from_dense(torch.tensor([[1.0, 0, 2.0], [3.0, 0, 0]]))
    assert metrics.l0(codes) == (1.5, 1, 1, 2)
    assert metrics.l0(torch.arange(101)) == (50, 5, 50, 95)
    assert str(metrics.l0(codes)) == "1.5 (1/1/2)"
    assert metrics.density(codes).tolist() == [1.0, 0.0, 0.5]
    assert metrics.dead_latents(codes).tolist() == [1]


def test_no_rows_are_not_a_number():
    """Nothing measured is NaN, and no crash."""
    assert math.isnan(metrics.l0(torch.zeros(0)).mean)
    assert math.isnan(metrics.ReconstructionMeter(2, 3).summary()["nmse"])


def test_the_meter_is_the_whole():
    """Batch by batch gives what all rows at once give."""
    torch.manual_seed(0)
    sae, x = sh.SAE(8, 40, "linear", "topk", k=3), torch.randn(50, 8) + 2
    recons, codes = sae(x)
    meter = metrics.ReconstructionMeter(8, 40)
    for part in (slice(0, 7), slice(7, 7), slice(7, 50)):
        meter.update(x[part], recons[part], codes[part])
    found = meter.summary()
    assert found["nmse"] == pytest.approx(metrics.nmse(x, recons))
    assert found["fvu"] == pytest.approx(metrics.fvu(x, recons))
    assert found["l0"] == pytest.approx(metrics.l0(codes).mean)
    assert found["dead"] == metrics.dead_latents(codes).numel()
    assert found["rows"] == 50
    assert torch.equal(meter.counts, codes.counts())
    assert int(meter.support_sizes.sum()) == 50
