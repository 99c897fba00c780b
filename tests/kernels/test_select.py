"""Selection: exact, the same on every path, whatever the scores."""

from __future__ import annotations

import pytest
import torch
from hard_scores import KINDS, dense_mask, parts, scores_of, sparsemax_by_sorting, weights

from saehooks import kernels, sparsemax
from saehooks.errors import ConfigError, WidthError
from saehooks.kernels import BatchTopK, Entmax, Sparsemax, Threshold, TopK, reference, select, select_rows
from saehooks.kernels.reference import select as reference_select

RULES = [Sparsemax(), Entmax(1.5), TopK(3), Threshold(0.5)]
RULE_NAMES = ["sparsemax", "entmax", "topk", "threshold"]
nan, inf = float("nan"), float("inf")


def check_form(support, scores):
    """Compressed rows: ascending, within range, offsets that fit, the scores themselves at hand."""
    rows, d_sae = scores.shape
    assert support.offsets.shape == (rows + 1,)
    assert support.offsets[0] == 0
    assert support.offsets[-1] == support.indices.numel()
    flat = dense_mask(scores, support).nonzero()
    assert torch.equal(flat[:, 1], support.indices)
    assert support.threshold.shape == (rows,)
    assert torch.equal(support.scores, scores[flat[:, 0], flat[:, 1]].to(support.scores))
    assert support.indices.numel() == 0 or int(support.indices.max()) < d_sae


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d_sae", [1, 2, 65, 1000, 4096])
def test_sparsemax_is_exact(path, device, kind, d_sae):
    """Sparsemax weights agree with sorting in float64 to 1e-6 in L1, for every kind of row, scale and width."""
    for scale in (1e-4, 0.03, 1.0, 1e4):
        scores = scores_of(kind, 3, d_sae, scale).to(device)
        support = select_rows(scores, Sparsemax())
        check_form(support, scores)
        error = (weights(scores, support) - sparsemax_by_sorting(scores)).abs().sum(1)
        assert float(error.max()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_sparsemax_probabilities_are_exact_in_float32(path, device, kind):
    """What `sparsemax` returns is within 1e-6 of float64 in L1, also where thousands of large scores are selected."""
    for d_sae, scale in ((65, 1.0), (20000, 1e-4), (20000, 1.0), (20000, 1e4)):
        scores = scores_of(kind, 2, d_sae, scale).to(device)
        found = sparsemax(scores).probs.double()
        assert float((found - sparsemax_by_sorting(scores)).abs().sum(1).max()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_entmax_is_exact(path, device, kind, alpha):
    """Entmax probabilities over the selected support sum to 1, and what is left out has none."""
    for d_sae, scale in ((1, 1.0), (65, 0.1), (1000, 1.0), (1000, 1e4)):
        scores = scores_of(kind, 3, d_sae, scale).to(device)
        support = select_rows(scores, Entmax(alpha))
        check_form(support, scores)
        shifted = scores.double() - scores.double().amax(1, keepdim=True)
        tau = reference_select.entmax_threshold(shifted, alpha)
        probs = ((alpha - 1) * (shifted - tau[:, None]).clamp(min=0)) ** (1 / (alpha - 1))
        torch.testing.assert_close(probs.sum(1), torch.ones_like(tau), rtol=0, atol=1e-6)
        wrong = torch.where(dense_mask(scores, support), (probs == 0) & (shifted < tau[:, None] - 1e-6), probs > 1e-6)
        assert not wrong.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "d_sae"), [(1, 300), (300, 300), (7, 4096), (300, 4096)])
def test_topk_takes_the_largest_positive_scores_and_of_equals_the_first(path, device, kind, k, d_sae):
    """Top-k agrees with a stable sort, on ties too, and never takes a score that is not positive."""
    scores = scores_of(kind, 4, d_sae, 1.0).to(device)
    support = select_rows(scores, TopK(k))
    check_form(support, scores)
    order = scores.sort(dim=1, descending=True, stable=True)
    expected = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order.indices[:, :k], True) & (scores > 0)
    assert torch.equal(dense_mask(scores, support), expected)
    assert torch.equal(support.threshold, order.values[:, k - 1].clamp(min=0))


@pytest.mark.parametrize("kind", KINDS)
def test_threshold_takes_what_is_above(path, device, kind):
    """A threshold, one number or one for each latent, selects what lies strictly above it."""
    scores = scores_of(kind, 3, 1000, 1.0).to(device)
    each = torch.linspace(-1, 1, 1000, device=device)
    for theta in (0.0, 1.0, each):
        support = select_rows(scores, Threshold(theta))
        check_form(support, scores)
        assert torch.equal(dense_mask(scores, support), scores > theta)


def test_selection_by_hand(path, device):
    """Three scores whose sparsemax, top-2 and threshold supports are known."""
    scores = torch.tensor([[1.0, 0.5, -1.0], [3.0, 0.0, 2.5]], device=device)
    sparse = select_rows(scores, Sparsemax())
    assert sparse.indices.tolist() == [0, 1, 0, 2]
    assert sparse.offsets.tolist() == [0, 2, 4]
    assert sparse.threshold.tolist() == [0.25, 2.25]
    assert select_rows(scores, TopK(2)).indices.tolist() == [0, 1, 0, 2]
    assert select_rows(scores, Threshold(0.75)).offsets.tolist() == [0, 1, 3]


@pytest.mark.parametrize("rule", RULES, ids=RULE_NAMES)
@pytest.mark.parametrize("d_sae", [6, 700])
def test_rows_without_a_finite_maximum_keep_their_argmax_alone(path, device, rule, d_sae):
    """NaN beats infinity, the first of equals wins, and the other rows of the batch are as if they were alone."""
    scores = scores_of("random", 7, d_sae, 1.0).to(device)
    scores[0, 3] = nan
    scores[1, 5] = inf
    scores[2] = -inf
    scores[3, : d_sae // 2] = -inf
    scores[4, 1], scores[4, 2], scores[4, 4] = inf, -nan, nan
    scores[5, 2], scores[5, 4] = inf, -inf
    support = select_rows(scores, rule)
    nonfinite = {0: 3, 1: 5, 2: 0, 4: 2, 5: 2}
    for row, latent in nonfinite.items():
        assert support.indices[support.offsets[row] : support.offsets[row + 1]].tolist() == [latent]
        assert torch.equal(support.threshold[row].isnan(), scores[row, latent].isnan())
        assert scores[row, latent].isnan() or support.threshold[row] == scores[row, latent]
    for row in (3, 6):
        alone = select_rows(scores[row : row + 1].clone(), rule)
        assert torch.equal(support.indices[support.offsets[row] : support.offsets[row + 1]], alone.indices)
        assert not scores[row, alone.indices].isinf().any()


@pytest.mark.parametrize("rule", RULES, ids=RULE_NAMES)
def test_strides_of_the_scores_do_not_matter(path, device, rule):
    """Transposed and sliced scores give what a contiguous copy gives."""
    scores = scores_of("random", 9, 130, 1.0).to(device)
    expected = select_rows(scores, rule)
    for same in (scores.T.contiguous().T, torch.stack([scores, scores], 2)[:, :, 0]):
        assert not same.is_contiguous()
        found = select_rows(same, rule)
        assert all(torch.equal(a, b) for a, b in zip(parts(found), parts(expected), strict=True))


def test_empty_batches_and_one_latent(path, device):
    """No rows give an empty support, one latent is always chosen by sparsemax."""
    for rule in (Sparsemax(), TopK(1), Threshold(0.0)):
        none = select_rows(torch.zeros(0, 5, device=device), rule)
        assert none.indices.numel() == 0
        assert none.offsets.tolist() == [0]
    one = select_rows(torch.tensor([[-3.0], [0.0]], device=device), Sparsemax())
    assert one.indices.tolist() == [0, 0]
    assert one.threshold.tolist() == [-4.0, -1.0]


def test_supports_may_be_as_large_as_the_dictionary(path, device):
    """Untrained or silent rows select everything, next to rows that select one latent."""
    scores = torch.zeros(40, 3000, device=device)
    scores[::2, 7] = 5.0
    support = select_rows(scores, Sparsemax())
    assert support.offsets.diff().tolist() == [1, 3000] * 20


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(path, device, threads):
    """One thread or several: the same support."""
    scores = scores_of("trained", 300, 2048, 3.0).to(device)
    expected = select_rows(scores, Sparsemax())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = select_rows(scores, Sparsemax())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.offsets, expected.offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_selection_from_queries_equals_selection_from_scores(path, device, dtype, monkeypatch):
    """Scores are made chunk by chunk, with bias, and never in less than float32; the support is that of all scores."""
    from saehooks.kernels.reference import select as module

    queries, keys = torch.randn(50, 16, device=device).to(dtype), torch.randn(200, 16, device=device).to(dtype)
    bias = torch.randn(200, device=device).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for given in (None, bias):
        scores = queries.to(wide) @ keys.to(wide).T + (0 if given is None else given.to(wide))
        expected = dense_mask(scores, reference.select_rows(scores, Sparsemax()))
        whole = kernels.select(queries, keys, Sparsemax(), given)
        monkeypatch.setattr(module, "SCORE_BYTES", 7 * 200 * 8)
        monkeypatch.setattr(module, "CPU_SCORE_BYTES", 7 * 200 * 4)
        pieces = kernels.select(queries, keys, Sparsemax(), given)
        monkeypatch.undo()
        assert (dense_mask(scores, whole) == expected).float().mean() > 0.9999
        assert (dense_mask(scores, pieces) == expected).float().mean() > 0.9999
        assert whole.scores.dtype == wide


def test_what_cannot_be_selected_is_refused(path, device):
    """More winners than latents, or queries of another width, raise errors that say so."""
    queries, keys = torch.zeros(2, 4, device=device), torch.zeros(6, 4, device=device)
    with pytest.raises(ConfigError, match="k=7"):
        kernels.select(queries, keys, TopK(7))
    with pytest.raises(ConfigError, match="k=7"):
        select_rows(queries @ keys.T, TopK(7))
    with pytest.raises(WidthError, match="agree"):
        kernels.select(queries[:, :3], keys, Sparsemax())


@pytest.fixture
def denormals_as_zeros():
    """As ``torch.set_flush_denormal(True)`` sets it, for this thread."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor keeps denormal numbers")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("rule", [Threshold(0.0), TopK(3), Threshold(torch.zeros(130)), BatchTopK(3)])
def test_zeros_are_not_positive_where_denormals_count_as_zeros(path, device, denormals_as_zeros, rule):
    """What relu and top-k select is above 0, also where the smallest positive float32 numbers compare as 0."""
    scores = torch.zeros(2, 130, device=device)
    scores[:, [5, 77]] = torch.tensor([2.0, 1.0], device=device)
    if isinstance(rule, BatchTopK):
        found = select(scores, torch.eye(130, device=device), rule)
    else:
        found = select_rows(scores, rule)
    assert found.indices.tolist() == [5, 77, 5, 77]


def test_the_smallest_positive_numbers_are_positive(path, device):
    """Where denormal numbers count, they are selected."""
    scores = torch.tensor([[0.0, 1e-45, -1e-45, 2e-45, 0.0]], device=device)
    for rule in (Threshold(0.0), TopK(4)):
        assert select_rows(scores, rule).indices.tolist() == [1, 3]
