"""Choosing again among refined scores: against dense formulas, and what it means for training and for traces."""

from __future__ import annotations

import pytest
import torch
from test_grid import rows
from test_refinement import own_rates, plain

import saehooks as sh
from saehooks.errors import ConfigError
from saehooks.kernels import Step, simplex_thresholds
from saehooks.support import offsets_of
from saehooks.training.losses import LossConfig, default_loss, training_loss
from saehooks.training.trainer import TrainConfig, Trainer


def sparsemax_densely(scores):
    """Bool (rows, n): the support of the projection onto the simplex, by sorting. -inf is no candidate."""
    ordered = scores.sort(1, descending=True).values
    k = torch.arange(1, scores.shape[1] + 1)
    sums = ordered.masked_fill(ordered.isinf(), 0).cumsum(1)
    size = ((1 + k * ordered > sums) & ordered.isfinite()).sum(1, keepdim=True)
    return scores > (sums.gather(1, size - 1) - 1) / size


CHOOSE_TWICE = [
    ("concepts", "sparsemax", {"reselect": 1.6, "key_scale": 0.5}),
    ("linear", "sparsemax", {"reselect": 1.2}),
    ("linear", "topk", {"reselect": 5, "k": 12}),
    ("concepts", "topk", {"reselect": 3, "k": 8}),
]


@pytest.mark.parametrize(("dictionary", "activation", "settings"), CHOOSE_TWICE)
@pytest.mark.parametrize("method", ["gradient", "bounded"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_rule_is_applied_to_refined_scores(dictionary, activation, settings, steps, method):
    """A step on the wide choice, the rule once more among those latents, the other steps on what is left: densely."""
    torch.manual_seed(0)
    more = {"refine": steps, "refine_rate": 0.2, "refine_method": method}
    sae, x = sh.SAE(16, 64, dictionary, activation, **more, **settings), rows(40)
    sae.initialise(x)
    codes, first = sae.eval().encode(x), plain(sae, x)
    support = torch.zeros(40, 64, dtype=torch.bool)
    for row in range(40):
        support[row, first[row].indices] = True
    W = sae.directions(torch.arange(64)).detach()
    scale = torch.ones(40, 1) if first.scale is None else first.scale.detach()[:, None]
    offset = sae.dictionary.offset
    target = (x if offset is None else x - offset.detach()) / scale
    values = first.dense().detach()
    for i in range(steps):
        missed = target - values @ W
        change = missed @ W.T * support
        values = values + own_rates(sae, torch.tensor(0.2), missed, change @ W) * change
        if i == 0:
            among = values.masked_fill(~support, -torch.inf)
            if activation == "topk":
                kth = among.topk(settings["reselect"], 1).values[:, -1:]
                support = (among >= kth) & (among > 0)
            else:
                support = sparsemax_densely(settings["reselect"] * among)
            values = values * support
    assert torch.equal(codes.dense() != 0, support & (values != 0))
    assert float(codes.sizes.float().mean()) < float(first.sizes.float().mean())
    torch.testing.assert_close(codes.dense(), values, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("step", [Step(), Step(backend="reference")], ids=["fastest", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_threshold_of_chosen_latents_is_that_of_a_sort(dtype, step):
    """Ragged rows of every kind: ties, one entry, huge and tiny scores, none at all, NaN and infinity."""
    draw = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 1e4):
        sizes = torch.randint(0, 30, (60,), generator=draw)
        scores = (torch.randn(int(sizes.sum()), generator=draw) * scale).to(dtype)
        scores[::7] = scores[0]
        broken = scores.split(sizes.tolist())[-1]
        if len(broken):
            broken[0] = torch.inf if scale == 1 else torch.nan
        tau = simplex_thresholds(scores, offsets_of(sizes), scale=1.5, step=step)
        assert tau.shape == (60,)
        for one, threshold in zip(scores.split(sizes.tolist()), tau, strict=True):
            one = 1.5 * one.double()
            if not len(one) or not bool(one.isfinite().all()):
                assert threshold == -torch.inf
                continue
            assert torch.equal(one > threshold, sparsemax_densely(one[None])[0])
            assert float((one - threshold).clamp(min=0).sum()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("dictionary", ["concepts", "linear"])
def test_gradients_go_through_both_choices(dictionary):
    """Gradients for x, the tables and the rates agree with finite differences in float64."""
    torch.manual_seed(0)
    sae = sh.SAE(5, 12, dictionary, refine=2, reselect=1.3, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*sae.named_parameters(), strict=True)

    def recons(x, *values):
        return torch.func.functional_call(sae, dict(zip(names, values, strict=True)), (x,)).recons

    assert torch.autograd.gradcheck(recons, (x, *parameters), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"reselect": 1.5, "refine": 2, "key_scale": 0.6}])
def test_the_loss_of_the_first_pass(settings):
    """Its term is the reconstruction loss of the unrefined codes, and comes by default with refinement."""
    sae, x = sh.SAE(16, 64, **{"refine": 1, **settings}), rows(64)
    sae.initialise(x)
    loss = training_loss(sae.train(), x, default_loss(sae))
    bare = plain(sae, x)
    missed = (sae.decode(bare) - x).square().sum(1) / (x - sae.dictionary.offset).square().sum(1)
    assert float(loss.terms["first_pass"]) == pytest.approx(0.3 * float(missed.mean().detach()), rel=1e-5)
    with pytest.raises(ConfigError, match="write refine=1"):
        training_loss(sh.SAE(16, 64), x, LossConfig(first_pass=0.1))


def test_rows_of_huge_norm_count_beside_the_others():
    """The second term is one ratio of sums, and comes by default where the activation chooses twice."""
    sae, x = sh.SAE(16, 64, refine=1, reselect=1.5).double(), rows(64).double()
    x[3] *= 100
    config = default_loss(sae)
    assert (config.energy, default_loss(sh.SAE(16, 64, refine=1)).energy) == (0.02, 0.0)
    loss = training_loss(sae.train(), x, config)
    centred = x - sae.dictionary.offset
    expected = 0.02 * (sae(x).recons - x).square().sum() / centred.square().sum()
    assert float(loss.terms["energy"].detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert float(loss.total.detach()) == pytest.approx(sum(float(term) for term in loss.terms.values()), rel=1e-12)


def test_it_trains_saves_and_attaches(tmp_path):
    """Fewer latents than were first selected, the same after a save, NaN rows alone NaN, traces count what is left."""
    sae, x = sh.SAE(16, 64, refine=2, reselect=1.5, key_scale=0.6), rows(1024)
    trainer = Trainer(sae, TrainConfig(batch_size=256, buffer_rows=512, warmup_steps=1, decay=0.0, lr=3e-3))
    trainer.push(x)
    trainer.drain()
    assert trainer.latest("l0") == pytest.approx(float(sae.train().encode(x).sizes.double().mean()), rel=0.2)
    sae.save(tmp_path)
    again = sh.load(tmp_path)
    assert torch.equal(again(x).recons, sae.eval()(x).recons)
    broken = x[:4].clone()
    broken[1, 3], broken[2] = float("nan"), 0.0
    found = again(broken).recons
    assert found[1].isnan().all()
    assert not found[[0, 2, 3]].isnan().any()
    torch.testing.assert_close(found[[0, 3]], again(x[[0, 3]]).recons)
    model = torch.nn.Sequential(torch.nn.Identity())
    with sh.splice(model, again, at="0", where=sh.everywhere) as trace:
        spliced = model(x[None, :8])
    torch.testing.assert_close(spliced[0], again(x[:8]).recons)
    assert float(trace.codes.sizes.double().mean()) < float(plain(again, x[:8]).sizes.double().mean())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"reselect": 1.4}, "write refine=1"),
        ({"refine": 1, "reselect": 0}, "reselect=0"),
        ({"refine": 1, "reselect": 1.4, "values": "weight"}, "values='score'"),
        ({"refine": 1, "reselect": 4, "activation": "relu"}, "not for relu"),
        ({"refine": 1, "reselect": 9, "activation": "topk", "k": 8}, "1 to 8"),
        ({"refine": 1, "reselect": 1.5, "activation": "topk", "k": 8}, "how many of the k=8"),
    ],
)
def test_what_is_refused(settings, match):
    """Each says what it is for."""
    with pytest.raises(ConfigError, match=match):
        sh.SAE(16, 64, **settings)
