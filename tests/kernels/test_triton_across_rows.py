"""Batch top-k on the Triton kernels: exactly what the reference selects, also of equal scores, without waiting."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import waiting
from forced import forced
from hard_scores import KINDS, dense_mask, scores_of

from saehooks import SAE, kernels
from saehooks.errors import ConfigError
from saehooks.kernels import BatchTopK, Capacity, Step, Support, Threshold, TopK
from saehooks.kernels.gpu import across_rows
from saehooks.kernels.gpu import scores as scores_module
from saehooks.kernels.gpu import select as select_module
from saehooks.kernels.gpu.launch import BatchPlan, SelectPlan
from saehooks.support import rows_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = BatchPlan(SelectPlan(64, 32, 16, 32, 1, 1), fold=2, share=64, block=32, warps=1)
"""Lists of 16, so that most rows are streamed."""
nan, inf = float("nan"), float("inf")
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN):RuntimeWarning")


def by_kernels(scores: torch.Tensor, k: int, **settings) -> Support:
    rule = select_module.describe(BatchTopK(k), scores.shape[1], scores.device)
    return across_rows.select_batch(scores, rule, **settings)


def by_reference(scores: torch.Tensor, k: int) -> Support:
    rows, d_sae = scores.shape
    return kernels.batch_topk(iter(scores.clone().split(2)), k * rows, rows, d_sae, scores.device)


def assert_same(found: Support, scores: torch.Tensor, expected: Support) -> None:
    assert torch.equal(found.offsets, expected.offsets)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.threshold, expected.threshold)
    rows = rows_of(found.offsets, found.indices.numel())
    torch.testing.assert_close(found.scores, scores[rows, found.indices], rtol=0, atol=0, equal_nan=True)


def test_batch_top_k_by_hand():
    """The budget goes where the scores are; negative scores are never selected."""
    scores = torch.tensor([[5.0, 4.0, 3.0], [2.0, 1.0, -1.0]], device=DEVICE)
    found = by_kernels(scores, 2)
    assert found.indices.tolist() == [0, 1, 2, 0]
    assert found.offsets.tolist() == [0, 3, 4]
    assert found.threshold.tolist() == [2.0, 2.0]
    found = by_kernels(scores, 3)
    assert found.offsets.tolist() == [0, 3, 5]
    assert found.threshold.tolist() == [1.0, 1.0]
    found = by_kernels(-scores.abs(), 2)
    assert found.offsets.tolist() == [0, 0, 0]
    assert found.threshold.tolist() == [inf, inf]


@pytest.mark.parametrize("plan", [None, SMALL], ids=["listed", "streamed"])
@pytest.mark.parametrize("k", [1, 7, 60, 200])
def test_any_rows_together_select_what_the_reference_selects(plan, k):
    """Rows of every hard kind at once, some a thousand times the scale of others, with budgets up to all there is."""
    scores = torch.cat([scores_of(kind, 1, 200, scale) for kind in KINDS for scale in (0.01, 10.0)]).to(DEVICE)
    assert_same(by_kernels(scores, k, plan=plan), scores, by_reference(scores, k))


@pytest.mark.parametrize("kind", ["random", "equal", "tied", "zero", "negative", "spike"])
def test_one_kind_of_row_with_its_ties(kind):
    """Of equal scores the first rows' are selected, and in a row the lowest latents'."""
    scores = scores_of(kind, 4, 90, 1.0).to(DEVICE)
    for plan in (None, SMALL._replace(fold=1)):
        assert_same(by_kernels(scores, 5, plan=plan), scores, by_reference(scores, 5))


def test_of_equal_scores_the_first_are_selected():
    """Twelve ones, room for six: a whole row, and half of the next."""
    found = by_kernels(torch.ones(3, 4, device=DEVICE), 2)
    assert found.indices.tolist() == [0, 1, 2, 3, 0, 1]
    assert found.offsets.tolist() == [0, 4, 6, 6]


def test_rows_that_are_not_finite_take_nothing_from_the_budget():
    """NaN, infinite and all -inf rows keep their argmax alone, whatever the others select."""
    scores = torch.ones(5, 4, device=DEVICE).cumsum(1)
    scores[1, 2], scores[2, 0], scores[3] = nan, inf, -inf
    found = by_kernels(scores, 1)
    assert_same(found, scores, by_reference(scores, 1))
    assert found.offsets.tolist() == [0, 3, 4, 5, 6, 8]
    assert by_kernels(scores[1:4], 1).indices.tolist() == [2, 0, 0]


@pytest.mark.parametrize("d_sae", [1, 2, 65, 3000])
def test_every_width(d_sae):
    """One latent, few, and rows of several tiles."""
    scores = scores_of("trained", 3, d_sae, 1.0).to(DEVICE)
    k = min(40, d_sae)
    assert_same(by_kernels(scores, k), scores, by_reference(scores, k))


def test_a_batch_of_one_row_is_top_k():
    """What the paper says of batch top-k."""
    scores = scores_of("tied", 1, 300, 1.0).to(DEVICE)
    with forced("gpu"):
        assert torch.equal(by_kernels(scores, 9).indices, kernels.select_rows(scores, TopK(9)).indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection_from_queries_takes_the_kernels_while_the_scores_fit_one_piece(dtype, monkeypatch):
    """A bias is added in the kernel; more scores than SCORE_BYTES go to the reference, with the same result."""
    made = torch.Generator().manual_seed(0)
    queries = torch.randn(6, 16, generator=made).to(DEVICE, dtype)
    keys, bias = torch.randn(90, 16, generator=made).to(DEVICE, dtype), torch.randn(90, generator=made).to(DEVICE)
    scores = queries.float() @ keys.float().T + bias
    with forced("gpu"):
        found = kernels.select(queries, keys, BatchTopK(5), bias)
        monkeypatch.setattr(scores_module, "score_rows", lambda rows, d_sae: 2)
        pieces = kernels.select(queries, keys, BatchTopK(5), bias)
        with pytest.raises(ConfigError, match="larger than the batch"):
            kernels.select(queries, keys, BatchTopK(91))
    expected = by_reference(scores, 5)
    assert torch.equal(dense_mask(scores, found), dense_mask(scores, expected))
    assert torch.equal(found.indices, pieces.indices)
    assert found.scores is not None
    assert pieces.scores is None


def test_a_capacity_is_filled_without_waiting():
    """Padding belongs to no row; an overflow is seen on the device; nothing is read back inside the block."""
    scores = torch.cat([scores_of(kind, 1, 200, 1.0) for kind in ("random", "tied", "spike")]).to(DEVICE)
    exact = by_kernels(scores, 8)
    room = Capacity(30)
    with waiting.never(DEVICE):
        found = by_kernels(scores, 8, step=Step(capacity=room))
    assert (room.used, room.overflowed) == (24, False)
    assert found.indices.shape == found.scores.shape == (30,)
    assert torch.equal(found.offsets, exact.offsets)
    assert torch.equal(found.indices[:24], exact.indices)
    assert not found.scores[24:].any()
    room = Capacity(10)
    found = by_kernels(scores, 8, step=Step(capacity=room))
    assert room.overflowed
    assert torch.equal(found.offsets, exact.offsets.clamp(max=10))
    assert torch.equal(found.indices, exact.indices[:10])


@pytest.mark.parametrize("activation", ["batchtopk", "mutual_choice"])
def test_an_sae_trains_as_on_the_reference_path(activation):
    """Codes, gradients and the running threshold, which eval mode then uses."""
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    kept = {}
    for name in ("reference", "gpu"):
        torch.manual_seed(0)
        sae = SAE(8, 60, dictionary="linear", activation=activation, k=4, device=DEVICE).train()
        with forced(name):
            codes = sae.encode(x)
            (sae.decode(codes) - x).square().sum().backward()
            gradients = [p.grad.clone() for p in sae.parameters() if p.grad is not None]
            sae.eval()
            assert isinstance(sae.activation.rule(), Threshold)
            kept[name] = codes, gradients, sae.activation.threshold, sae.encode(x)
    (codes, gradients, threshold, live), (expected, theirs, smallest, alive) = kept["gpu"], kept["reference"]
    assert torch.equal(codes.indices, expected.indices)
    assert codes.indices.numel() == 80
    torch.testing.assert_close(codes.values, expected.values)
    torch.testing.assert_close(gradients, theirs)
    torch.testing.assert_close(threshold, smallest)
    assert torch.equal(live.indices, alive.indices)
