"""Selection across rows, chunk by chunk: the same as from the whole score matrix."""

from __future__ import annotations

import pytest
import torch

from saehooks import kernels
from saehooks.errors import ConfigError
from saehooks.kernels import BatchTopK, FeatureChoice, batch_topk
from saehooks.kernels.reference import across_rows
from saehooks.kernels.reference import select as reference_select

nan, inf = float("nan"), float("inf")


def dense(support, shape):
    """Bool mask of a support."""
    rows = torch.repeat_interleave(torch.arange(shape[0]), support.offsets.diff())
    return torch.zeros(shape, dtype=torch.bool).index_put((rows, support.indices), torch.tensor(True))


@pytest.mark.parametrize("chunk", [1, 3, 7, 20])
@pytest.mark.parametrize("total", [0, 1, 40, 200, 600])
def test_the_running_pool_finds_the_largest(chunk, total):
    """However the rows are cut, the selection is the top of the whole batch, positive scores only."""
    table = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    found = batch_topk(iter(table.clone().split(chunk)), total, 20, 30, table.device)
    expected = torch.zeros(600, dtype=torch.bool)
    expected[table.flatten().topk(total).indices] = True
    expected = expected.view(20, 30) & (table > 0)
    assert torch.equal(dense(found, (20, 30)), expected)
    lowest = table[expected].min() if expected.any() else torch.tensor(inf)
    assert torch.equal(found.threshold, lowest.expand(20))


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_of_equal_scores_the_first_are_selected(chunk):
    """However the rows are cut: the first rows' first, in a row the lowest latents'."""
    table = torch.ones(5, 4)
    table[2, 1] = 2.0
    found = batch_topk(iter(table.clone().split(chunk)), 6, 5, 4, table.device)
    assert found.indices.tolist() == [0, 1, 2, 3, 0, 1]
    assert found.offsets.tolist() == [0, 4, 5, 6, 6, 6]


def test_rows_that_are_not_finite_stand_apart():
    """NaN, infinite and all -inf rows keep their argmax alone; in batch top-k they take nothing from the budget."""
    table = torch.ones(5, 4).cumsum(1)
    table[1, 2], table[2, 0], table[3] = nan, inf, -inf
    for found in (
        batch_topk(iter(table.clone().split(2)), 3, 5, 4, table.device),
        across_rows.feature_choice(lambda a, b: table[:, a:b].clone(), torch.tensor([0, 0, 1, 2]), 5, 3),
    ):
        mask = dense(found, (5, 4))
        assert mask[1:4].nonzero()[:2].tolist() == [[0, 2], [1, 0]]
        assert mask[3].sum() <= 1
        assert int(mask[[0, 4]].sum()) <= 3
    first = batch_topk(iter(table.clone().split(2)), 3, 5, 4, table.device)
    assert dense(first, (5, 4))[[0, 4]].nonzero()[:, 1].tolist().count(3) == 2


def test_blocks_of_columns_change_nothing(monkeypatch):
    """Scores are made for a few latents at a time; the assignment is that of all at once."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(30, 8, generator=generator), torch.randn(50, 8, generator=generator)
    bias, budgets = torch.randn(50, generator=generator), torch.randint(0, 31, (50,), generator=generator)
    whole = kernels.select(queries, keys, FeatureChoice(budgets), bias)
    monkeypatch.setattr(reference_select, "SCORE_BYTES", 30 * 4 * 7)
    pieces = kernels.select(queries, keys, FeatureChoice(budgets), bias)
    assert torch.equal(whole.indices, pieces.indices)
    table = queries @ keys.T + bias
    rank = table.argsort(dim=0, descending=True).argsort(dim=0)
    assert torch.equal(dense(whole, (30, 50)), (rank < budgets) & (table > 0))


def test_budgets_larger_than_the_batch_are_errors():
    """More matches than rows times latents, or more tokens for a latent than there are, are refused."""
    queries, keys = torch.randn(3, 8), torch.randn(5, 8)
    for rule in (BatchTopK(6), FeatureChoice(torch.tensor([0, 0, 4, 0, 0]))):
        with pytest.raises(ConfigError, match="larger than the batch"):
            kernels.select(queries, keys, rule)
    with pytest.raises(ConfigError, match="k >= 1"):
        BatchTopK(0)


def test_no_rows():
    """An empty batch selects nothing."""
    queries, keys = torch.randn(0, 8), torch.randn(5, 8)
    for rule in (BatchTopK(2), FeatureChoice(torch.zeros(5, dtype=torch.int64))):
        found = kernels.select(queries, keys, rule)
        assert found.indices.numel() == 0
        assert found.offsets.tolist() == [0]
