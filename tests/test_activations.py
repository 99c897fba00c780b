"""Activations against dense formulations in float64, the package entmax, and answers by hand."""

from __future__ import annotations

import math

import entmax
import pytest
import torch

import saehooks as sh
from saehooks.activations import fit_zipf
from saehooks.activations.entmax import entmax_weights
from saehooks.activations.sparsemax import simplex_weights
from saehooks.activations.zipf import apportion, ranks
from saehooks.errors import ConfigError
from saehooks.kernels import Entmax, select_rows
from saehooks.support import rows_of


def scores_of(rows=12, d_sae=80, scale=1.0, seed=0):
    return torch.randn(rows, d_sae, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def spread(support, values, like):
    """Dense tensor of compressed values."""
    rows = rows_of(support.offsets, support.indices.numel())
    return torch.zeros_like(like).index_put((rows, support.indices), values)


# ------------------------------------------------------------------ sparsemax


@pytest.mark.parametrize("scale", [1e-5, 1e-2, 1.0, 1e4])
def test_sparsemax_matches_the_package_entmax(scale):
    """Projections and their gradients agree with another implementation at every scale."""
    mine, theirs = (scores_of(scale=scale).requires_grad_() for _ in range(2))
    direction = scores_of(seed=1)
    found, expected = sh.sparsemax(mine), entmax.sparsemax(theirs, dim=-1)
    torch.testing.assert_close(found.probs, expected, rtol=1e-9, atol=1e-9)
    (found.probs * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_sparsemax_by_hand():
    """Two of three alternatives above tau = 0.25; along any axis."""
    scores = torch.tensor([[1.0, 0.5, -1.0]])
    probs, size, tau = sh.sparsemax(scores)
    assert probs.tolist() == [[0.75, 0.25, 0.0]]
    assert (size.tolist(), tau.tolist()) == ([2], [0.25])
    assert torch.equal(sh.sparsemax(scores.T, dim=0).probs, probs.T)


def test_sparsemax_gradcheck():
    """The gradient is the derivative, in float64."""
    scores = scores_of(3, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: sh.sparsemax(s).probs, scores)


def test_sparsemax_refuses_what_it_cannot_project():
    """Integers and empty axes are errors that say what to write; NaN stays NaN."""
    with pytest.raises(ConfigError, match="float"):
        sh.sparsemax(torch.tensor([1, 2]))
    with pytest.raises(ConfigError, match="empty"):
        sh.sparsemax(torch.zeros(2, 0))
    assert sh.sparsemax(torch.tensor([1.0, math.nan])).probs.isnan().any()


def test_all_equal_scores_share_evenly():
    """A row of equal scores selects everything, each with the same weight."""
    probs, size, _ = sh.sparsemax(torch.full((2, 5), 3.0))
    torch.testing.assert_close(probs, torch.full((2, 5), 0.2))
    assert size.tolist() == [5, 5]


def test_simplex_weights_shift_by_the_mean():
    """Large scores lose no precision: the weights of a row still sum to 1."""
    scores, offsets = torch.tensor([1e4 + 0.25, 1e4 - 0.25]), torch.tensor([0, 2])
    assert simplex_weights(scores, offsets).tolist() == [0.75, 0.25]


# --------------------------------------------------------------------- entmax


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_entmax_matches_the_package(alpha, scale):
    """Supports, probabilities and gradients agree with bisection, for fixed alpha."""
    mine, theirs = (scores_of(scale=scale).requires_grad_() for _ in range(2))
    direction = scores_of(seed=1)
    support = select_rows(mine.detach(), Entmax(alpha))
    rows = rows_of(support.offsets, support.indices.numel())
    weights = entmax_weights(mine[rows, support.indices], support.offsets, torch.tensor(alpha, dtype=torch.float64))
    expected = entmax.entmax_bisect(theirs, alpha=alpha, dim=-1, n_iter=100)
    found = spread(support, weights, mine)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert torch.equal(found > 0, expected > 1e-25)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_entmax_gradcheck_in_scores_and_alpha():
    """Both gradients are derivatives, over a given support."""
    scores = torch.tensor([0.3, 0.1, -0.2, 1.0, 0.9], dtype=torch.float64, requires_grad=True)
    offsets, alpha = torch.tensor([0, 3, 5]), torch.tensor(1.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, a: entmax_weights(s, offsets, a), (scores, alpha), atol=1e-5)


def test_entmax_alpha_two_is_sparsemax():
    """At alpha = 2 supports and weights are those of sparsemax."""
    x = torch.randn(20, 8)
    torch.manual_seed(0)
    one = sh.SAE(8, 40, "concepts", "entmax", alpha=2.0, values="weight")
    two = sh.SAE(8, 40, "concepts", "sparsemax", values="weight")
    two.dictionary.load_state_dict(one.dictionary.state_dict())
    torch.testing.assert_close(one.encode(x).dense(), two.encode(x).dense())


def test_a_smaller_alpha_selects_more():
    """Supports grow from sparsemax towards softmax."""
    scores = scores_of(30, 400).float()
    sizes = [float(select_rows(scores, Entmax(alpha)).offsets.diff().double().mean()) for alpha in (2.0, 1.5, 1.25)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] / 3


def test_learned_alpha_moves_and_survives_saving(tmp_path):
    """A learned alpha gets a gradient, stays within (1, 2), and is stored."""
    sae = sh.SAE(8, 40, "concepts", "entmax", values="weight", learn_alpha=True, alpha=1.5)
    assert float(sae.activation.alpha.detach()) == pytest.approx(1.5, abs=1e-6)
    x = torch.randn(64, 8)
    (raw,) = sae.activation.parameters()
    (grad,) = torch.autograd.grad((sae(x).recons - x).square().sum(), raw)
    with torch.no_grad():
        raw -= 0.3 * grad.sign()
    moved = float(sae.activation.alpha.detach())
    assert moved != pytest.approx(1.5, abs=1e-2)
    assert 1 < moved < 2
    sae.save(tmp_path)
    assert float(sh.load(tmp_path).activation.alpha.detach()) == pytest.approx(moved)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.1, float("nan")])
def test_alpha_outside_one_to_two_is_refused(alpha):
    """Softmax and beyond are no sparse activations."""
    with pytest.raises(ConfigError, match="1 < alpha <= 2"):
        sh.SAE(4, 8, activation="entmax", alpha=alpha)
    with pytest.raises(ConfigError):
        Entmax(alpha)


def test_learned_alpha_needs_weights():
    """Scores do not depend on alpha, so learning it from them is an error, not a silent constant."""
    with pytest.raises(ConfigError, match="weight"):
        sh.SAE(4, 8, activation="entmax", learn_alpha=True, values="score")


# ---------------------------------------------------------------- relu family


def linear(activation, d_in=6, d_sae=20, **settings):
    torch.manual_seed(0)
    sae = sh.SAE(d_in, d_sae, "linear", activation, dtype=torch.float64, **settings)
    with torch.no_grad():
        sae.dictionary.b_enc.normal_()
        sae.dictionary.b_dec.normal_()
    return sae


def dense_scores(sae, x):
    return (x - sae.dictionary.b_dec) @ sae.dictionary.W_enc + sae.dictionary.b_enc


def test_relu_is_relu():
    """Codes are the positive scores."""
    sae, x = linear("relu"), torch.randn(9, 6, dtype=torch.float64)
    torch.testing.assert_close(sae.encode(x).dense(), dense_scores(sae, x).relu())


def test_gated_values_and_gradients_are_those_of_the_formula():
    """[s + b_gate > 0] relu(exp(r_mag) s + b_mag), with gradients to magnitudes and none to the gate."""
    sae, x = linear("gated"), torch.randn(9, 6, dtype=torch.float64)
    gate = sae.activation
    with torch.no_grad():
        for parameter in (gate.b_gate, gate.b_mag, gate.r_mag):
            parameter.normal_()
    direction = torch.randn(9, 20, dtype=torch.float64)
    wanted = [sae.dictionary.W_enc, gate.r_mag, gate.b_mag]

    def both(dense):
        return torch.autograd.grad((dense * direction).sum(), wanted)

    scores = dense_scores(sae, x)
    formula = (scores + gate.b_gate > 0) * (gate.r_mag.exp() * scores + gate.b_mag).relu()
    codes = sae.encode(x)
    torch.testing.assert_close(codes.dense(), formula)
    for mine, theirs in zip(both(codes.dense()), both(formula), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(codes.support_size, (scores + gate.b_gate > 0).sum(1))


def jump_by_hand(sae, x, width):
    """Dense jumprelu whose threshold gradient is written out: values, and -theta / width near the threshold."""
    scores, theta = dense_scores(sae, x), sae.activation.theta
    near = ((scores - theta).abs() < width / 2).double().detach()
    values = scores * (scores > theta)
    return values - (near * theta.detach() / width) * (theta - theta.detach()), scores, near


def test_jumprelu_gradients_are_the_rectangle_kernel():
    """Thresholds learn from scores on both sides of them, as in the dense formulation."""
    sae, x = linear("jumprelu", threshold=0.8, bandwidth=0.9), torch.randn(40, 6, dtype=torch.float64)
    direction = torch.randn(40, 6, dtype=torch.float64)
    wanted = [sae.activation.log_theta, sae.dictionary.W_enc, sae.dictionary.W_dec]
    mine = torch.autograd.grad((sae(x).recons * direction).sum(), wanted)
    values, scores, near = jump_by_hand(sae, x, 0.9)
    assert int((near * (scores <= sae.activation.theta)).sum()) > 10
    theirs = torch.autograd.grad((values @ sae.dictionary.W_dec * direction).sum(), wanted)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_jumprelu_counts_only_what_jumped():
    """L0, codes and eval mode see scores above the threshold only; near ones take part in training alone."""
    sae, x = linear("jumprelu", threshold=0.8, bandwidth=0.9), torch.randn(40, 6, dtype=torch.float64)
    above = dense_scores(sae, x) > 0.8
    stages = sae.train().encode_stages(x)
    assert torch.equal(stages.codes.support_size, above.sum(1))
    assert stages.candidates.indices.numel() > stages.codes.indices.numel()
    torch.testing.assert_close(stages.candidates.dense(), stages.codes.dense())
    torch.testing.assert_close(sae.eval().encode(x).dense(), dense_scores(sae, x) * above)


def test_jumprelu_starts_where_it_is_told():
    """start_l0 sets thresholds from data, and the unit is the scale of the activations."""
    sae = sh.SAE(16, 200, "linear", "jumprelu", start_l0=10)
    x = torch.randn(500, 16) * 7
    sae.initialise(x)
    assert float(sae.activation.unit) == pytest.approx(28, rel=0.05)
    assert float(sae.encode(x).support_size.double().mean()) == pytest.approx(10, rel=0.05)


# ---------------------------------------------------------------- top-k, batch


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "mutual_choice", "feature_choice"])
@pytest.mark.parametrize("k", [0, -1, 9, 2.5, True])
def test_k_outside_the_dictionary_is_refused(activation, k):
    """k of 0, above d_sae, or no whole number: an error that names both."""
    with pytest.raises(ConfigError, match="1 <= k <= d_sae"):
        sh.SAE(4, 8, "linear", activation, k=k)


@pytest.mark.parametrize("activation", ["batchtopk", "mutual_choice"])
def test_batch_budget_is_exact_and_the_largest(activation):
    """Training selects exactly the k * rows largest scores of the batch."""
    sae, x = linear(activation, k=3), torch.randn(10, 6, dtype=torch.float64)
    scores = dense_scores(sae, x)
    floor = scores.flatten().topk(30).values.min()
    codes = sae.train().encode(x)
    torch.testing.assert_close(codes.dense(), scores.where(scores >= floor, 0.0))
    assert codes.indices.numel() == 30
    assert float(sae.activation.threshold) == pytest.approx(float(floor.detach()), rel=1e-6)


@pytest.mark.parametrize("activation", ["batchtopk", "mutual_choice", "feature_choice"])
def test_all_scores_negative_select_nothing(activation):
    """Only positive scores are ever chosen; thresholds stay as they were."""
    sae, x = linear(activation, k=3), torch.randn(10, 6, dtype=torch.float64)
    with torch.no_grad():
        sae.dictionary.b_enc.fill_(-1e6)
    out = sae.train()(x)
    assert out.codes.indices.numel() == 0
    torch.testing.assert_close(out.recons, sae.dictionary.b_dec.expand(10, 6))
    before = sae.state_dict()
    assert all(not bool(t.any()) for name, t in before.items() if "threshold" in name or "batches" in name)


def test_all_scores_negative_in_row_activations():
    """relu, top-k and jumprelu reconstruct the offset alone; sparsemax still takes its best latents."""
    x = torch.randn(3, 6, dtype=torch.float64)
    for activation, sizes in (("relu", 0), ("topk", 0), ("jumprelu", 0), ("sparsemax", 1)):
        sae = linear(activation, **({"k": 3} if activation == "topk" else {}))
        with torch.no_grad():
            sae.dictionary.b_enc.fill_(-1e6)
        assert int(sae.encode(x).support_size.min()) >= sizes
        assert bool((sae.encode(x).support_size == 0).all()) is (sizes == 0)


@pytest.mark.parametrize("activation", ["batchtopk", "mutual_choice"])
def test_batch_of_one_row_is_topk(activation):
    """With one row the budget is that row's k."""
    x = torch.randn(1, 6, dtype=torch.float64)
    torch.testing.assert_close(linear(activation, k=3).encode(x).dense(), linear("topk", k=3).encode(x).dense())


def test_threshold_is_a_running_mean_updated_in_training_alone():
    """Plain mean of the first batches' smallest selected scores; eval mode leaves it alone and uses it."""
    sae = linear("batchtopk", k=2)
    lows = []
    for seed in range(3):
        x = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        lows.append(float(sae.train().encode(x).values.min().detach()))
    assert float(sae.activation.threshold) == pytest.approx(sum(lows) / 3)
    before = sae.activation.threshold.clone()
    codes = sae.eval().encode(x)
    assert torch.equal(sae.activation.threshold, before)
    torch.testing.assert_close(codes.dense(), dense_scores(sae, x).where(dense_scores(sae, x) > before, 0.0))


# -------------------------------------------------------------- feature choice


def brute_force(scores, budgets):
    """Each latent's top positive rows, one at a time."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for latent, budget in enumerate(budgets.tolist()):
        for row in scores[:, latent].argsort(descending=True)[:budget]:
            mask[row, latent] = scores[row, latent] > 0
    return mask


@pytest.mark.parametrize("budgets", ["uniform", "zipf"])
def test_feature_choice_is_the_brute_force_assignment(budgets):
    """Every latent takes its own best tokens, as many as its budget; budgets add up exactly."""
    sae = linear("feature_choice", k=4, budgets=budgets, zipf_shift=1.0)
    for seed in range(2):
        x = torch.randn(11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        shares = sae.activation.shares(11, sae.density.mean)
        assert int(shares.sum()) == 44
        assert int(shares.max()) <= 11
        scores = dense_scores(sae, x)
        mask = brute_force(scores, shares)
        torch.testing.assert_close(sae.train().encode(x).dense(), scores * mask)


def test_feature_choice_with_positive_scores_spends_the_whole_budget():
    """Where there are positive scores enough, exactly k * rows matches are made."""
    sae = linear("feature_choice", k=4, budgets="uniform")
    with torch.no_grad():
        sae.dictionary.b_enc.fill_(100.0)
    codes = sae.train().encode(torch.randn(10, 6, dtype=torch.float64))
    assert codes.counts().tolist() == [2] * 20


def test_feature_choice_thresholds_are_per_latent():
    """In eval mode a latent fires above the running mean of the smallest score it took; one that took none never."""
    sae = linear("feature_choice", k=2)
    x = torch.randn(5, 6, dtype=torch.float64)
    codes = sae.train().encode(x)
    took = codes.counts() > 0
    dense = codes.dense()
    smallest = dense.where(dense > 0, math.inf).amin(0)
    torch.testing.assert_close(sae.activation.thresholds[took], smallest[took])
    x = torch.randn(50, 6, dtype=torch.float64)
    used = sae.eval().encode(x)
    assert not bool((used.counts() > 0)[~took].any())
    scores = dense_scores(sae, x)
    torch.testing.assert_close(used.dense(), scores * (scores > smallest))


def test_feature_choice_of_one_row_is_defined():
    """One row: as many latents as the budget may take it, those with the first claim."""
    codes = linear("feature_choice", k=3).train().encode(torch.randn(1, 6, dtype=torch.float64))
    assert int(codes.support_size) <= 3


def test_zipf_settings_are_checked():
    """A wrong way to share, or a curve that rises, is refused."""
    with pytest.raises(ConfigError, match="uniform"):
        sh.SAE(4, 8, "linear", "feature_choice", k=2, budgets="fair")
    with pytest.raises(ConfigError, match="negative"):
        sh.SAE(4, 8, "linear", "feature_choice", k=2, zipf_exponent=-1.0)


def test_apportion_by_hand():
    """Whole matches in proportion, largest remainders first, none above the cap, the sum exact."""
    assert apportion(torch.tensor([6.0, 3.0, 1.0]), 10, 5).tolist() == [5, 4, 1]
    assert apportion(torch.ones(4), 6, 3, first=torch.tensor([3, 2, 1, 0])).tolist() == [1, 1, 2, 2]
    assert apportion(torch.ones(3), 9, 3).tolist() == [3, 3, 3]
    assert apportion(torch.tensor([1.0, 0.0]), 3, 3).tolist() == [3, 0]
    assert apportion(torch.ones(5), 0, 3).tolist() == [0] * 5


@pytest.mark.parametrize("seed", range(5))
def test_apportion_adds_up(seed):
    """Random weights over six orders of magnitude: sums exact, caps kept."""
    generator = torch.Generator().manual_seed(seed)
    weights = 10 ** (6 * torch.rand(50, generator=generator))
    for total in (0, 1, 49, 51, 320, 400):
        shares = apportion(weights, total, 8)
        assert int(shares.sum()) == total
        assert 0 <= int(shares.min()) <= int(shares.max()) <= 8


def test_a_budget_larger_than_the_batch_is_an_error():
    """More matches than there are places cannot be shared."""
    with pytest.raises(ConfigError, match="larger than the batch"):
        apportion(torch.ones(3), 10, 3)


def test_zipf_fit_finds_the_curve():
    """Densities made from a curve give it back, dead latents ignored."""
    density = torch.cat([0.4 / (torch.arange(1, 400).double() + 10) ** 1.3, torch.zeros(50)])
    curve = fit_zipf(density[torch.randperm(449, generator=torch.Generator().manual_seed(0))])
    assert curve.exponent == pytest.approx(1.3, rel=0.02)
    assert float(curve.at(torch.tensor(5))) == pytest.approx(0.4 / 15**1.3, rel=0.02)
    assert fit_zipf(torch.zeros(4)).scale == 0


def test_ranks():
    """1 for the densest; equals in order."""
    assert ranks(torch.tensor([0.1, 0.5, 0.1, 0.0])).tolist() == [2, 1, 3, 4]


# -------------------------------------------------------------------- density


def test_density_counts_training_rows_and_silences_the_over_frequent():
    """A latent that fired too often has score 0: it is out in training, and stays out in eval mode."""
    sae = linear("relu", max_density=0.6)
    with torch.no_grad():
        sae.dictionary.b_enc[4] = 100.0
    x = torch.randn(20, 6, dtype=torch.float64)
    assert bool((sae.train().encode(x).of(4) > 0).all())
    assert float(sae.density.mean[4]) == 1.0
    assert int(sae.density.rows) == 20
    assert not bool(sae.eval().encode(x).of(4).any())
    assert int(sae.density.rows) == 20
    assert not bool(sae.train().encode(x).of(4).any())
    assert float(sae.density.mean[4]) == 0.5


def test_density_mask_is_saved(tmp_path):
    """The counts behind the mask travel with the SAE."""
    sae = linear("relu", max_density=0.3)
    x = torch.randn(20, 6, dtype=torch.float64)
    sae.train().encode(x)
    sae.save(tmp_path)
    torch.testing.assert_close(sh.load(tmp_path).encode(x).dense(), sae.eval().encode(x).dense())


def test_silencing_is_off_unless_asked_for():
    """Nothing is tracked by default, and a share outside (0, 1] is refused."""
    assert linear("relu").density.mean is None
    for share in (0.0, 1.5):
        with pytest.raises(ConfigError, match="max_density"):
            linear("relu", max_density=share)


def test_old_counts_fade():
    """Past the horizon counts are halved, so densities follow the training."""
    density = sh.SAE(2, 2, "linear", "relu", track_density=True).density
    density.update(torch.tensor([900_000, 0]), 900_000)
    density.update(torch.tensor([0, 200_000]), 200_000)
    assert density.rows.item() == 550_000
    assert density.mean.tolist() == pytest.approx([9 / 11, 2 / 11], rel=1e-3)


@pytest.mark.parametrize(("activation", "name"), [("batchtopk", "threshold"), ("feature_choice", "thresholds")])
def test_running_thresholds_of_a_bfloat16_sae_move(activation, name):
    """A hundred batches whose smallest score is 2 % above the running mean bring it there, also in bfloat16."""
    torch.manual_seed(0)
    sae = sh.SAE(8, 32, "linear", activation, k=4, dtype=torch.bfloat16)
    running = getattr(sae.activation, name)
    assert running.dtype == torch.float32
    assert getattr(sae.float().bfloat16().activation, name).dtype == torch.float32
    assert getattr(sae.double().activation, name).dtype == torch.float64
    sae = sae.bfloat16().train()
    x = torch.randn(64, 8, dtype=torch.bfloat16)
    for _ in range(120):
        sae(x)
    reached = getattr(sae.activation, name).clone()
    for _ in range(400):
        sae(1.02 * x)
    moved = getattr(sae.activation, name) / reached
    used = reached > 0
    assert used.any()
    assert (moved[used] > 1.01).all() if activation == "batchtopk" else (moved[used] > 1.01).float().mean() > 0.8
