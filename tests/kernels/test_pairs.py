"""Selection among pairs of factors: the loops, through the screen and without it, against all scores formed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saehooks as sh
from saehooks.errors import ConfigError, InexactError, WidthError
from saehooks.kernels import (
    BatchTopK,
    Entmax,
    Sparsemax,
    Step,
    Support,
    Threshold,
    TopK,
    batch_topk,
    select_pair_products,
    select_pairs,
    select_rows,
)

pytest.importorskip("numba")
from saehooks.kernels.cpu import pairs, screen

RULES = ["topk", "all", "sparsemax", "entmax", "relu", "threshold", "thresholds", "negative", "batch"]
REFERENCE = Step(backend="reference")


def rule_of(name, d_sae):
    steps = torch.linspace(0.1, 2, d_sae)
    return {
        "topk": TopK(min(7, d_sae)), "all": TopK(d_sae), "sparsemax": Sparsemax(), "entmax": Entmax(1.5),
        "relu": Threshold(0.0), "threshold": Threshold(0.7), "thresholds": Threshold(steps),
        "negative": Threshold(steps - 0.5), "batch": BatchTopK(min(5, d_sae)),
    }[name]  # fmt: skip


def explicit(queries, first, second, heads, rule):
    """The support of all scores, of factors in float32, as plain torch forms them."""
    p = (queries @ first.T).relu().unflatten(1, (heads, -1))
    q = (queries @ second.T).relu().unflatten(1, (heads, -1))
    scores = (p[:, :, :, None] * q[:, :, None, :]).sqrt().flatten(1)
    if isinstance(rule, BatchTopK):
        return batch_topk([scores], rule.k * len(scores), *scores.shape, scores.device), p, q, scores
    return select_rows(scores, rule, step=REFERENCE), p, q, scores


def made(m, n, heads, seed, scale=1.0, finite=False):
    """Rows of every kind: usual ones, zeros, alike, tiny; unless ``finite`` huge, one NaN and one infinity."""
    torch.manual_seed(seed)
    queries = torch.randn(23, 12)
    queries[3], queries[5], queries[8] = 0, 1e-30, queries[7]
    if not finite:
        queries[6], queries[10, 2], queries[12, 0] = 1e30, float("nan"), float("inf")
    first, second = torch.randn(heads * m, 12) * scale, torch.randn(heads * n, 12) * scale
    first[-1], second[0] = 0, second[-1]
    return queries, first, second


def same(found, expected, scores):
    """The same entries, but for scores that the last bits of a threshold decide; the same thresholds."""
    rows, d_sae = scores.shape
    masks = [
        torch.zeros(rows, d_sae, dtype=torch.bool).index_put((one.rows, one.indices), torch.tensor(True))
        for one in (found, expected)
    ]
    apart = (masks[0] != masks[1]).nonzero()
    for row, latent in apart.tolist():
        assert scores[row, latent] == pytest.approx(float(expected.threshold[row]), rel=1e-5)
    usual = expected.threshold.isfinite()
    assert torch.equal(found.threshold.isfinite(), usual)
    torch.testing.assert_close(found.threshold[usual].float(), expected.threshold[usual].float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("m", "n", "heads"), [(4, 4, 80), (8, 8, 1), (1, 1, 64), (2, 1, 32), (1, 64, 1), (3, 5, 70)])
def test_factors_given(name, m, n, heads):
    """Whatever the rule and the shape of heads, the loops select what the scores of all pairs would."""
    rule = rule_of(name, heads * m * n)
    expected, p, q, scores = explicit(*made(m, n, heads, 0, finite=name == "batch"), heads, rule)
    for step in (Step(), REFERENCE):
        found = select_pairs(p, q, rule, step=step)
        assert torch.equal(found.offsets, expected.offsets)
        assert torch.equal(found.indices, expected.indices)
        same(found, expected, scores)
        if found.scores is not None:
            torch.testing.assert_close(found.scores, scores[found.rows, found.indices], equal_nan=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(RULES),
    sizes=st.sampled_from([(4, 4, 80), (2, 3, 40), (8, 8, 16), (1, 1, 200), (16, 4, 64)]),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    mode=st.sampled_from(["on", "off", "check"]),
)
def test_products(name, sizes, seed, scale, mode):
    """Through the screen and without it: the support of factors that are multiplied in float32."""
    m, n, heads = sizes
    given_ = made(m, n, heads, seed, scale, finite=name == "batch")
    rule = rule_of(name, heads * m * n)
    expected, _, _, scores = explicit(*given_, heads, rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "MODE", mode)
        same(select_pair_products(*given_, heads, rule), expected, scores)


def test_the_screen_multiplies_few_factors_anew(monkeypatch):
    """Of 2 x 1,024 factors of a row, those of pairs that a top-16 selection may hold: at most a sixth."""
    torch.manual_seed(0)
    queries, first, second = torch.randn(300, 64), torch.randn(1024, 64), torch.randn(1024, 64)
    monkeypatch.setattr(screen, "MODE", "on")
    exact = []
    monkeypatch.setattr(pairs, "_exact", lambda *given: exact.append(len(given[0])))
    found = select_pair_products(queries, first, second, 256, TopK(16))
    assert (found.offsets.diff() == 16).all()
    assert exact == []  # no row was undecided, and so none had more than a sixth of its factors made anew


def test_a_screen_that_loses_a_pair_is_told(monkeypatch):
    """With an error bound that is far too small the check finds pairs that the screen lost."""
    torch.manual_seed(0)
    given_ = torch.randn(400, 64), torch.randn(1024, 64), torch.randn(1024, 64), 256, TopK(16)
    monkeypatch.setattr(screen, "MODE", "check")
    select_pair_products(*given_)
    real = pairs.rounded_keys
    monkeypatch.setattr(pairs, "rounded_keys", lambda keys, bias: real(keys.roll(1, 0), bias))
    with pytest.raises(InexactError, match="SAEHOOKS_SCREEN=off"):
        select_pair_products(*given_)


def test_copies_of_changed_tables_are_made_anew(monkeypatch):
    """An SAE in use keeps its factors' tables in bfloat16, and notices that they were changed in place."""
    monkeypatch.setattr(screen, "MODE", "on")
    torch.manual_seed(0)
    sae = sh.presets.kron_sae(16, 4096, k=8).eval()
    x = torch.randn(200, 16)
    for _ in range(2):
        with torch.no_grad():
            codes = sae.encode(x)
            dense = sae.encode(x, step=REFERENCE)
        assert torch.equal(codes.indices, dense.indices)
        torch.testing.assert_close(codes.values, dense.values)
        held = sae.dictionary._screen_tables.nbytes
        assert held >= 2 * 2 * 1024 * 16  # P and Q, two bytes a number
        with torch.no_grad():
            sae.dictionary.P.copy_(torch.randn_like(sae.dictionary.P))
            sae.dictionary.Q.mul_(-1)


def test_scores_of_a_support_that_carries_none():
    """A support made by hand is scored, with the gradient of its pairs, as the formula says."""
    torch.manual_seed(0)
    sae = sh.presets.kron_sae(8, 64, k=4)
    x = torch.randn(5, 8, requires_grad=True)
    support = Support(torch.arange(10) * 6, torch.arange(6) * 2)
    found = sae.dictionary.scores(sae.dictionary.prepare(x), support)
    with torch.no_grad():
        again = sae.dictionary.scores(sae.dictionary.prepare(x.detach()), support)
    queries = x - sae.b_dec
    p, q = (queries @ sae.dictionary.P.T).relu(), (queries @ sae.dictionary.Q.T).relu()
    row = torch.arange(5).repeat_interleave(2)
    pair = support.indices // 4
    product = p[row, pair] * q[row, pair // 4 * 4 + support.indices % 4]
    torch.testing.assert_close(found, product.sqrt())
    torch.testing.assert_close(again, product.sqrt())
    positive = product > 0
    mine = torch.autograd.grad(found[positive].sum(), x, retain_graph=True)[0]
    theirs = torch.autograd.grad(product[positive].sqrt().sum(), x)[0]
    torch.testing.assert_close(mine, theirs)


def test_bad_input_is_told():
    """Widths that differ, and more latents than there are."""
    queries, first, second = torch.randn(3, 4), torch.randn(8, 4), torch.randn(8, 4)
    with pytest.raises(WidthError):
        select_pair_products(queries, first, torch.randn(8, 5), 4, TopK(2))
    with pytest.raises(ConfigError, match="17"):
        select_pair_products(queries, first, second, 4, TopK(17))
