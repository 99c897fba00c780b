"""Training losses: each term by hand or against a dense formulation; what auxiliary terms do for dead latents."""

from __future__ import annotations

import pytest
import torch

import saehooks as sh
from saehooks import presets
from saehooks.demo.data import photos
from saehooks.errors import ConfigError
from saehooks.training.losses import LossConfig, default_loss, reconstruction, training_loss, under_used
from saehooks.training.trainer import TrainConfig, Trainer


def sae_of(activation, dictionary="linear", d_sae=24, **settings):
    torch.manual_seed(0)
    sae = sh.SAE(6, d_sae, dictionary, activation, dtype=torch.float64, **settings)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return sae, torch.randn(30, 6, dtype=torch.float64) + 1


def test_reconstruction_by_hand():
    """The three kinds on two rows."""
    x, recons = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 3.0], [0.0, 0.0]])
    assert float(reconstruction(x, recons)) == pytest.approx((1 / 25 + 1) / 2)
    assert float(reconstruction(x, recons, "mse")) == pytest.approx(5 / 29)
    assert float(reconstruction(x, recons, "per_norm")) == pytest.approx(10 * (1 / 5 + 4 / 2) / 4)
    shifted = reconstruction(x, recons, "mse", torch.tensor([0.0, 2.0]))
    assert float(shifted) == pytest.approx(5 / 13)


def test_zero_rows_are_finite():
    """A zero-norm activation has a finite loss and finite gradients."""
    for kind in ("relative", "mse", "per_norm"):
        sae, x = sae_of("sparsemax", "concepts")
        x = torch.cat([x, torch.zeros(1, 6, dtype=torch.float64), sae.dictionary.b_dec.detach()[None]])
        loss = training_loss(sae, x, LossConfig(reconstruction=kind)).total
        loss.backward()
        assert bool(loss.isfinite())
        assert all(bool(p.grad.isfinite().all()) for p in sae.parameters() if p.grad is not None)


@pytest.mark.parametrize("dictionary", ["linear", "concepts", "kron"])
def test_l1_weighs_by_decoder_norms_and_row_norms(dictionary):
    """sum |a_i| |W_i| over the norm of the row about b_dec, with gradients to codes and directions."""
    sae, x = sae_of("relu", dictionary, **({"m": 2, "n": 3} if dictionary == "kron" else {}))
    loss = training_loss(sae, x, LossConfig(l1=0.3))
    out, b_dec = sae(x), sae.dictionary.b_dec
    scale = 1.0 if out.codes.scale is None else out.codes.scale[:, None]
    norms = sae.directions(torch.arange(24)).norm(dim=1)
    size = (x - b_dec).detach().norm(dim=1, keepdim=True)
    dense = 0.3 * (out.codes.dense().abs() * scale * norms / size).sum(1).mean()
    torch.testing.assert_close(loss.terms["l1"], dense.detach())
    whole = dense + reconstruction(x, out.recons, "relative", b_dec)
    for one, other in zip(
        torch.autograd.grad(loss.total, list(sae.parameters())),
        torch.autograd.grad(whole, list(sae.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_l1_does_not_depend_on_the_scale_of_activations():
    """Activations, bias and directions ten times as large: the same penalty."""
    sae, x = sae_of("relu", "concepts")
    small = training_loss(sae, x, LossConfig(l1=1.0)).terms["l1"]
    with torch.no_grad():
        sae.dictionary.b_dec.mul_(10)
    torch.testing.assert_close(training_loss(sae, 10 * x, LossConfig(l1=1.0)).terms["l1"], small, rtol=1e-5, atol=1e-6)


def test_l0_moves_thresholds_by_the_rectangle_kernel():
    """The penalty is the mean count; its gradient reaches log_theta alone."""
    sae, x = sae_of("jumprelu", threshold=0.5, bandwidth=0.4)
    scores = (x - sae.dictionary.b_dec) @ sae.dictionary.W_enc + sae.dictionary.b_enc
    theta = sae.activation.theta
    loss = training_loss(sae, x, LossConfig(l0=1.0))
    assert float(loss.terms["l0"]) == pytest.approx(float((scores > theta).double().sum(1).mean()))
    near = ((scores - theta).abs() < 0.2).double()
    expected = -(near / 0.4 * theta).mean(0) * 1.0
    plain = training_loss(sae, x, LossConfig()).total
    got = torch.autograd.grad(loss.total, sae.activation.log_theta)[0]
    base = torch.autograd.grad(plain, sae.activation.log_theta)[0]
    torch.testing.assert_close(got - base, expected.detach())
    aimed = training_loss(sae, x, LossConfig(l0=2.0, l0_target=4.0)).terms["l0"]
    assert float(aimed) == pytest.approx(2 * (float(loss.terms["l0"]) / 4 - 1) ** 2)


def test_gate_loss_trains_the_gate_through_a_detached_decoder():
    """relu(pi) reconstructs x; the gate's bias learns, the decoder gets nothing from this term."""
    sae, x = sae_of("gated")
    d, gate = sae.dictionary, sae.activation
    loss = training_loss(sae, x, LossConfig(gate=1.0))
    pi = (x - d.b_dec) @ d.W_enc + d.b_enc + gate.b_gate
    opening = reconstruction(x, pi.relu() @ d.W_dec.detach() + d.b_dec.detach(), "relative", d.b_dec)
    torch.testing.assert_close(loss.terms["gate"], opening.detach())
    plain = training_loss(sae, x, LossConfig()).total
    for parameter in (gate.b_gate, d.W_dec, d.b_dec):
        mine = torch.autograd.grad(loss.total, parameter, retain_graph=True)[0]
        rest = torch.autograd.grad(plain, parameter, retain_graph=True, allow_unused=True)[0]
        theirs = torch.autograd.grad(opening, parameter, retain_graph=True, allow_unused=True)[0]
        total = sum((t for t in (rest, theirs) if t is not None), torch.zeros_like(mine))
        torch.testing.assert_close(mine, total)


@pytest.mark.parametrize("dictionary", ["linear", "kron", "concepts"])
def test_aux_k_lets_dead_latents_reconstruct_the_error(dictionary):
    """The k_aux best dead latents of each row rebuild the detached error; live ones take no part."""
    sae, x = sae_of("topk", dictionary, k=3, **({"m": 2, "n": 3} if dictionary == "kron" else {}))
    idle = torch.zeros(24, dtype=torch.int64)
    dead = torch.tensor([1, 4, 5, 20, 23])
    idle[dead] = 100
    config = LossConfig(aux_k=1 / 32, k_aux=2, dead_after=100)
    loss = training_loss(sae, x, config, idle=idle)
    prepared = sae.dictionary.prepare(x)
    scores = torch.cat(list(sae.dictionary.score_chunks(prepared))).detach()[:, dead]
    best = scores.relu() * (scores >= scores.topk(2, dim=1).values[:, -1:])
    spread = torch.zeros(30, 24, dtype=torch.float64)
    spread[:, dead] = best
    scale = 1.0 if prepared.scale is None else prepared.scale[:, None]
    error = (x - sae(x).recons).detach()
    rebuilt = scale * (spread @ sae.directions(torch.arange(24)))
    weights = 1 / (x - sae.dictionary.b_dec).detach().square().sum(1)  # as in the reconstruction loss
    expected = (weights * (rebuilt - error).square().sum(1)).sum() / (weights * error.square().sum(1)).sum() / 32
    torch.testing.assert_close(loss.terms["aux_k"], expected.detach())
    assert "aux_k" not in training_loss(sae, x, config, idle=torch.zeros(24, dtype=torch.int64)).terms
    assert "aux_k" not in training_loss(sae, x, config).terms


def test_under_used_latents_lie_far_below_the_curve():
    """Latents whose density is less than half of what their rank promises, once five firings were to be expected."""
    sae, _ = sae_of("mutual_choice", d_sae=200, k=3)
    curve = 0.3 / torch.arange(1, 201).double()
    curve[150:] = curve[150:] / 10
    for rows, expected in ((10**6, list(range(150, 200))), (100, [])):
        sae.density.rows.fill_(rows)
        sae.density.fired.copy_((curve * rows).round().long())
        found = under_used(sae, LossConfig()).tolist()
        assert set(found) <= set(expected)
        assert len(found) >= 0.8 * len(expected)


def test_coefficients_rise():
    """penalty_warmup scales l1 and l0 from the first step on; None means full."""
    sae, x = sae_of("relu")
    config = LossConfig(l1=1.0, penalty_warmup=10)
    sizes = [float(training_loss(sae, x, config, step=step).terms["l1"]) for step in (0, 4, 9, 50, None)]
    assert sizes == pytest.approx([0.1 * sizes[-1], 0.5 * sizes[-1], *[sizes[-1]] * 3])


def test_terms_add_up():
    """The total is the sum of its parts."""
    sae, x = sae_of("gated")
    loss = training_loss(sae, x, LossConfig(l1=0.1, gate=1.0, aux_k=0.1, dead_after=1), idle=torch.ones(24).long())
    assert set(loss.terms) == {"relative", "l1", "gate", "aux_k"}
    torch.testing.assert_close(sum(loss.terms.values()), loss.total.detach())


@pytest.mark.parametrize(
    "settings",
    [{"reconstruction": "huber"}, {"l1": -1.0}, {"aux_k": -0.1}, {"k_aux": 0}, {"l0_target": 0.0}],
)
def test_settings_that_cannot_work_are_refused(settings):
    """Unknown kinds, negative coefficients and empty budgets are errors."""
    with pytest.raises(ConfigError):
        LossConfig(**settings)


def test_terms_an_sae_cannot_have_are_refused():
    """l0 without learned thresholds and aux_zipf without densities say what is missing."""
    sae, x = sae_of("topk", k=3)
    with pytest.raises(ConfigError, match="jumprelu"):
        training_loss(sae, x, LossConfig(l0=1.0))
    with pytest.raises(ConfigError, match="track_density"):
        training_loss(sae, x, LossConfig(aux_zipf=1.0))


@pytest.mark.parametrize(("dictionary", "activation"), [("concepts", "sparsemax"), ("linear", "topk")])
def test_prefixes_are_scored_by_the_first_latents_alone(dictionary, activation):
    """The term is the mean over prefixes of the loss by their dense codes, and its gradient that of the dense loss."""
    sae, x = sae_of(activation, dictionary, **({"k": 5} if activation == "topk" else {}))
    found = training_loss(sae, x, LossConfig(prefix=0.5, prefixes=(4, 12)))
    codes, right = sae.encode(x), []
    for size in (4, 12):
        values = codes.dense() * (torch.arange(24) < size)
        scale = 1.0 if codes.scale is None else codes.scale[:, None]
        recons = values @ sae.directions(torch.arange(24)) * scale + sae.dictionary.offset
        right.append(reconstruction(x, recons, center=sae.dictionary.offset))
    right = 0.5 * torch.stack(right).mean()
    assert float(found.terms["prefix"]) == pytest.approx(float(right.detach()), rel=1e-9)
    bare = training_loss(sae, x, LossConfig()).total
    for one, other in zip(
        torch.autograd.grad(found.total, [*sae.parameters()], retain_graph=True),
        torch.autograd.grad(bare + right, [*sae.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_an_sae_trained_on_prefixes_is_better_at_them():
    """With the term, the first quarter of the latents reconstructs better than without it."""
    errors = {}
    for name, loss in (("with", LossConfig(prefix=1.0, prefixes=(16,))), ("without", LossConfig())):
        torch.manual_seed(0)
        sae = sh.SAE(12, 64)
        x = torch.randn(2048, 6, generator=torch.Generator().manual_seed(1)).relu() @ torch.randn(
            6, 12, generator=torch.Generator().manual_seed(2)
        )
        trainer = Trainer(
            sae, TrainConfig(batch_size=256, buffer_rows=512, lr=5e-3, warmup_steps=5, passes=8, loss=loss)
        )
        trainer.push(x)
        trainer.drain()
        errors[name] = float(training_loss(sae.eval(), x, LossConfig(prefix=1.0, prefixes=(16,))).terms["prefix"])
    assert errors["with"] < 0.8 * errors["without"]


@pytest.mark.parametrize("prefixes", [(8, 4), (0, 4), (4, 4), (4, 24), ()])
def test_prefixes_that_do_not_ascend_are_refused(prefixes):
    """Sizes must ascend, start above 0 and stay below d_sae; a coefficient needs sizes."""
    sae, x = sae_of("topk", k=3)
    with pytest.raises(ConfigError, match="prefix"):
        training_loss(sae, x, LossConfig(prefix=1.0, prefixes=prefixes))


def test_each_activation_brings_its_loss():
    """fit and train use the terms of the paper an activation comes from."""
    expected = {
        "relu": {"l1"},
        "gated": {"l1", "gate"},
        "jumprelu": {"l0"},
        "topk": {"aux_k"},
        "batchtopk": {"aux_k"},
        "mutual_choice": {"aux_zipf"},
        "feature_choice": {"aux_zipf"},
        "sparsemax": set(),
        "entmax": set(),
    }
    for activation, terms in expected.items():
        config = default_loss(sh.SAE(4, 40, "linear", activation))
        assert {n for n in ("l1", "l0", "gate", "aux_k", "aux_zipf") if getattr(config, n)} == terms


# ------------------------------------------------------------- dead latents


@pytest.fixture(scope="module")
def patches():
    """4x4 patches of real photos, (6000, 48)."""
    images = torch.from_numpy(photos("train").images[:100]).float() / 255
    cut = images.unfold(1, 4, 4).unfold(2, 4, 4).reshape(-1, 48)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))[:6000]]


def dead_share(made, rows, loss):
    """Train 120 steps from a start where half of the latents are rarely positive and never win; the share left dead."""
    torch.manual_seed(1)
    sae = made(48, 64, k=4)
    sae.initialise(rows)
    spread = float((rows - rows.mean(0)).square().sum(1).mean().sqrt()) / 48**0.5
    with torch.no_grad():
        sae.dictionary.b_enc[:32] = -2 * spread
    trainer = Trainer(sae, TrainConfig(steps=120, batch_size=256, buffer_rows=512, lr=3e-3, warmup_steps=5, loss=loss))
    for step in range(120):
        start = 256 * (step % 23)
        trainer.step(rows[start : start + 256])
    return trainer.evaluate(rows)["dead"] / sae.d_sae


@pytest.mark.parametrize("term", ["aux_k", "aux_zipf"])
def test_auxiliary_terms_revive_latents(patches, term):
    """The same SAE on the same real rows ends with fewer dead latents with the term than without."""
    made = presets.topk_sae if term == "aux_k" else presets.mutual_choice_sae
    without, with_term = (
        dead_share(made, patches, LossConfig(**{term: coefficient}, dead_after=1000)) for coefficient in (0.0, 0.5)
    )
    assert without > 0.3
    assert with_term < 0.7 * without
