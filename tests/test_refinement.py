"""Refinement of values on the chosen support: against the formula written out densely, in every cell of the grid."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_grid import CELLS, cell, rows
from torch.autograd import forward_ad

import saehooks as sh
from saehooks.errors import ConfigError, WidthError
from saehooks.training.trainer import TrainConfig, Trainer


def plain(sae, x):
    """The same SAE without refinement: same parameters, codes of one pass."""
    settings = {name: value for name, value in sae.cfg.settings.items() if "refine" not in name and name != "reselect"}
    bare = sh.SAE(sae.d_in, sae.d_sae, sae.cfg.dictionary, sae.cfg.activation, dtype=sae.dtype, **settings)
    bare.load_state_dict({name: t for name, t in sae.state_dict().items() if "refinement" not in name})
    return bare.eval().encode(x)


def refined_densely(sae, x, codes):
    """Dense values after the formula's steps on the given codes' support, without any sparse product."""
    W = sae.directions(torch.arange(sae.d_sae)).detach()
    scale = torch.ones(len(x), 1) if codes.scale is None else codes.scale.detach()[:, None]
    offset = sae.dictionary.offset
    target = (x if offset is None else x - offset.detach()) / scale
    support = torch.zeros(len(x), sae.d_sae, dtype=torch.bool)
    for row in range(len(x)):
        support[row, codes[row].indices] = True
    values = codes.dense().detach()
    for rate in sae.refinement.rates.detach():
        values = values + rate * ((target - values @ W) @ W.T) * support
    return values


@pytest.mark.parametrize(("dictionary", "activation"), CELLS)
def test_refined_values_follow_the_formula_in_every_cell(dictionary, activation):
    """Two steps with rates of their own give what the dense formula gives, on the support of one pass."""
    sae, x = cell(dictionary, activation, refine=2), rows(40)
    sae.initialise(x)
    with torch.no_grad():
        sae.refinement.rates.copy_(torch.tensor([0.4, 0.15]))
    codes, before = sae.eval().encode(x), plain(sae, x)
    assert torch.equal(codes.indices, before.indices)
    torch.testing.assert_close(codes.dense(), refined_densely(sae, x, before), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("refine", [0, 1, 2])
@pytest.mark.parametrize(("dictionary", "activation"), CELLS)
def test_encoding_that_is_decoded_next_gives_the_same(dictionary, activation, refine):
    """Passes that encoding and decoding share change neither values, reconstructions nor gradients."""
    settings = {"refine": refine} if refine else {}
    start, x = cell(dictionary, activation, **settings), rows(40)
    start.initialise(x)
    found = []
    for shared in (False, True):
        sae = copy.deepcopy(start)  # encoding in train mode counts what fires
        stages = sae.encode_stages(x, decoding=shared)
        recons = sae.decode_stages(stages) if shared else sae.decode(stages.candidates)
        total = recons.sin().sum() + stages.candidates.values.square().sum()
        if stages.first_pass is not None:
            first = sae.decode_stages(stages, first_pass=True) if shared else sae.decode(stages.first_pass)
            total = total + first.cos().sum()
        total.backward()
        gradients = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
        found.append({"values": stages.candidates.values.detach(), "recons": recons.detach(), **gradients})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("refine", [1, 2])
@pytest.mark.parametrize(("dictionary", "activation"), CELLS)
def test_reading_without_gradients_gives_the_same(dictionary, activation, refine):
    """What is refined in one pass, in use, is what is refined with gradients."""
    sae, x = cell(dictionary, activation, refine=refine), rows(40)
    sae.initialise(x)
    sae.eval()
    with torch.no_grad():
        read = sae.encode(x)
    torch.testing.assert_close(read.dense(), sae.encode(x).dense().detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("refine", [0, 1])
def test_forward_gradients_are_never_dropped_in_silence(refine):
    """The products have no forward mode: an SAE in use says so, and does not return values without tangents."""
    sae, x = cell("linear", "topk", refine=refine), rows(8)
    sae.initialise(x)
    sae.eval().requires_grad_(False)
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        sae.encode(forward_ad.make_dual(x, torch.ones_like(x)))


def test_kept_directions_follow_the_tables():
    """A table changed in place is never read through the directions of before; copies keep none."""
    sae, x = cell("concepts", "sparsemax", refine=1), rows(40)
    sae.initialise(x)
    sae.eval().requires_grad_(False)
    sae.encode(x)
    kept = sae.dictionary._kept_directions
    assert kept.nbytes == sae.dictionary.C.numel() * 4 or sae.device.type != "cpu"
    assert sae.frozen().dictionary._kept_directions is kept
    for table in (sae.dictionary.W_v, sae.dictionary.C):
        table.mul_(1.3)
        torch.testing.assert_close(sae.encode(x).dense(), refined_densely(sae, x, plain(sae, x)), rtol=1e-3, atol=1e-4)
    assert copy.deepcopy(sae).dictionary._kept_directions.nbytes == 0
    assert pickle.loads(pickle.dumps(sae)).dictionary._kept_directions.nbytes == 0
    with torch.inference_mode():
        torch.testing.assert_close(sae.encode(x).dense(), refined_densely(sae, x, plain(sae, x)), rtol=1e-3, atol=1e-4)


def test_few_rows_of_many_latents_are_refined_without_kept_directions():
    """One row's values are the formula's, like those of many, and no second table is made for it."""
    torch.manual_seed(0)
    sae = sh.SAE(16, 2048, refine=2).eval().requires_grad_(False)
    x = rows(40)
    one = torch.cat([sae.encode(row).dense() for row in x.split(1)])
    assert sae.dictionary._kept_directions.nbytes == 0
    torch.testing.assert_close(one, refined_densely(sae, x, plain(sae, x)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sae.encode(x).dense(), one, rtol=1e-3, atol=1e-4)
    assert sae.dictionary._kept_directions.nbytes > 0 or sae.device.type != "cpu"


def test_a_first_pass_is_there_only_with_refinement():
    """Without refinement there is nothing to decode."""
    sae = cell("concepts", "sparsemax")
    with pytest.raises(ConfigError, match="refine=1"):
        sae.decode_stages(sae.encode_stages(rows(4)), first_pass=True)


def test_no_refinement_leaves_no_trace():
    """``refine=0`` has no parameter and gives bit for bit what an SAE without the setting gives."""
    torch.manual_seed(0)
    bare = sh.SAE(16, 64)
    torch.manual_seed(0)
    zero = sh.SAE(16, 64, refine=0)
    assert list(bare.state_dict()) == list(zero.state_dict())
    assert torch.equal(bare(rows()).recons, zero(rows()).recons)


def test_refinement_lowers_the_error_on_the_same_support():
    """A small step of the gradient lowers every row's error; a hundred reach least squares on the support."""
    sae, x = cell("concepts", "sparsemax", refine=1, refine_rate=0.05), rows(64)
    sae.initialise(x)
    before = (sae.decode(plain(sae, x)) - x).square().sum(1)
    assert bool(((sae.eval()(x).recons - x).square().sum(1) <= before + 1e-6).all())
    many = cell("linear", "topk", refine=400, refine_rate=0.3)
    many.initialise(x)
    with torch.no_grad():
        codes = many.eval().encode(x[:4])
        recons = many.decode(codes)
    for row in range(4):
        basis = many.directions(codes[row].indices).detach()
        best = torch.linalg.lstsq(basis.T, (x[row] - many.dictionary.offset.detach())[:, None]).solution
        residual = (basis.T @ best)[:, 0] + many.dictionary.offset.detach() - x[row]
        assert float((recons[row] - x[row]).norm()) < float(residual.norm()) + 0.02 * float(x[row].norm())


@pytest.mark.parametrize("dictionary", ["concepts", "linear"])
def test_gradients_of_refined_values(dictionary):
    """Gradients for x, the tables and the rates agree with finite differences in float64."""
    torch.manual_seed(0)
    sae = sh.SAE(5, 12, dictionary, refine=2, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*sae.named_parameters(), strict=True)

    def recons(x, *values):
        return torch.func.functional_call(sae, dict(zip(names, values, strict=True)), (x,)).recons

    assert torch.autograd.gradcheck(recons, (x, *parameters), eps=1e-7, atol=1e-5)


def test_a_refined_sae_trains_saves_and_attaches(tmp_path):
    """The rates are trained with the rest, come back from disk, and edits act on the refined codes."""
    sae, x = cell("concepts", "sparsemax", refine=1), rows(1024)
    trainer = Trainer(sae, TrainConfig(batch_size=256, buffer_rows=512, warmup_steps=1, decay=0.0, lr=3e-3))
    trainer.push(x)
    trainer.drain()
    assert float(sae.refinement.rates.detach()) != 0.5
    sae.save(tmp_path)
    again = sh.load(tmp_path)
    assert again.cfg.settings["refine"] == 1
    assert torch.equal(again(x).recons, sae.eval()(x).recons)

    model = torch.nn.Sequential(torch.nn.Identity())
    latent = int(again.encode(x[0]).indices[0])
    with sh.ablate(model, again, [latent], at="0", where=slice(0, None)):
        edited = model(x[None, :1])
    value = again.encode(x[:1]).dense()[0, latent]
    scale = again.encode(x[:1]).scale[0]
    torch.testing.assert_close(edited[0, 0], x[0] - scale * value * again.directions(latent)[0], rtol=1e-4, atol=1e-5)


def test_fixed_rates_are_not_trained():
    """``learn_refine_rate=False`` keeps the rates, and what an optimiser would move them by is None."""
    sae = sh.SAE(16, 64, refine=1, refine_rate=0.3, learn_refine_rate=False)
    sae(rows()).recons.square().mean().backward()
    assert sae.refinement.rates.grad is None
    assert not sae.refinement.rates.requires_grad


def test_rows_of_zeros_and_nan_stay_their_own():
    """A row of zeros reconstructs finitely; a row with NaN harms no other."""
    sae, x = cell("concepts", "sparsemax", refine=1), rows(8)
    sae.initialise(x)
    right = sae.eval()(x).recons
    broken = x.clone()
    broken[2], broken[5] = 0.0, float("nan")
    recons = sae(broken).recons
    others = torch.tensor([0, 1, 3, 4, 6, 7])
    torch.testing.assert_close(recons[others], right[others])
    assert bool(recons[2].isfinite().all())
    on_its_offset = sae(sae.dictionary.offset.detach()[None]).recons
    torch.testing.assert_close(on_its_offset[0], sae.dictionary.offset.detach())


@pytest.mark.parametrize(("settings", "word"), [({"refine": -1}, "refine=-1"), ({"refine": 1.5}, "refine=1.5")])
def test_a_wrong_number_of_steps_is_refused(settings, word):
    """Steps are a whole number that is not negative."""
    with pytest.raises(ConfigError, match=word):
        sh.SAE(16, 64, **settings)
    with pytest.raises(ConfigError, match="refine_rate"):
        sh.SAE(16, 64, refine=1, refine_rate=0.0)


@pytest.mark.parametrize("dictionary", ["concepts", "linear"])
def test_values_are_refined_by_the_directions_there_are_now(dictionary):
    """In use directions are kept; what is written past torch's count of changes, or one row alone, is seen as well."""
    torch.manual_seed(0)
    settings = {"activation": "topk", "k": 8, "refine": 1}
    sae, x = sh.SAE(12, 300, dictionary, **settings).eval().requires_grad_(False), torch.randn(20, 12)
    sae.encode(x)
    for change in (
        lambda p: p.data.mul_(1.5),
        lambda p: p.detach().numpy().__imul__(0.5),
        lambda p: p.data[len(p) // 2].mul_(-3) if p.ndim else None,
        lambda p: setattr(p, "data", p.data + 0.1),
    ):
        for p in sae.parameters():
            change(p)
            fresh = sh.SAE(12, 300, dictionary, **settings).eval().requires_grad_(False)
            fresh.load_state_dict(sae.state_dict())
            found, wanted = sae.encode(x), fresh.encode(x)
            assert torch.equal(found.indices, wanted.indices)
            torch.testing.assert_close(found.values, wanted.values)


# ------------------------------------------------------------------------ afterwards


@pytest.mark.parametrize(("dictionary", "activation"), CELLS)
def test_an_sae_refined_afterwards_selects_the_same_latents(dictionary, activation):
    """In every cell: the latents of before, values by the formula, a smaller error on other rows, the SAE untouched."""
    sae, x = cell(dictionary, activation), rows(300)
    sae.initialise(x)
    sae.eval()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    better, others = sae.refined(x[:200], steps=2), x[200:]
    old, new = sae(others), better(others)
    assert torch.equal(new.codes.indices, old.codes.indices)
    torch.testing.assert_close(new.codes.dense(), refined_densely(better, others, old.codes), rtol=2e-4, atol=2e-5)
    assert sh.metrics.token_nmse(others, new.recons) < sh.metrics.token_nmse(others, old.recons)
    assert all(torch.equal(tensor, sae.state_dict()[name]) for name, tensor in before.items())
    assert "refine" not in sae.cfg.settings
    assert all(p.requires_grad for p in better.parameters())
    assert not better.training


def test_steps_fitted_afterwards_are_the_best_there_are():
    """No size of one step, and no two of a lattice, have a smaller error by token on the rows they were fitted to."""
    sae, x = cell("linear", "topk"), rows(200)
    sae.initialise(x)
    first = sae.eval().encode(x).dense().detach()
    W, offset = sae.directions(torch.arange(sae.d_sae)).detach(), sae.dictionary.offset.detach()

    def error(*sizes):
        values = first
        for size in sizes:
            values = values + size * ((x - offset - values @ W) @ W.T) * (first != 0)
        return sh.metrics.token_nmse(x, values @ W + offset)

    lattice = torch.linspace(0.02, 1.5, 75).tolist()
    assert error(*sae.refined(x, steps=1).refinement.rates.tolist()) <= min(map(error, lattice)) + 1e-6
    best = min(error(one, two) for one in lattice[::3] for two in lattice[::3] if one <= two)
    assert error(*sae.refined(x, steps=2).refinement.rates.tolist()) <= best + 1e-6


def test_refining_afterwards_keeps_what_is_known_and_comes_back_from_disk(tmp_path):
    """The site stays, figures of the SAE without it do not; half precision and inference mode are no matter."""
    sae, x = cell("concepts", "sparsemax"), rows(200)
    sae.initialise(x)
    sae.cfg.metadata |= {"hook_name": "blocks.3.hook_resid_post", "metrics": {"held_out": {"nmse": 0.5}}}
    sae.eval()
    with torch.inference_mode():
        better = sae.refined(x)
    assert better.hook_name == sae.hook_name
    assert "metrics" not in better.cfg.metadata
    assert better.cfg.settings["refine"] == 3
    half = copy.deepcopy(sae).bfloat16().refined(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.refinement.rates.float(), better.refinement.rates, rtol=0.05, atol=0.05)
    better.save(tmp_path)
    assert torch.equal(sh.load(tmp_path)(x).recons, better(x).recons)


def test_what_cannot_be_refined_afterwards_says_so():
    """An SAE that refines already, no step, no activations, activations of another width, rows that say nothing."""
    sae, x = cell("concepts", "sparsemax"), rows(20)
    with pytest.raises(ConfigError, match="refines its values already"):
        cell("concepts", "sparsemax", refine=1).refined(x)
    for steps in (0, True, 1.5):
        with pytest.raises(ConfigError, match="steps="):
            sae.refined(x, steps=steps)
    for given in (x[:, :5], x.long(), [1.0, 2.0]):
        with pytest.raises(WidthError, match="fitted to activations"):
            sae.refined(given)
    with pytest.raises(ConfigError, match="no row"):
        sae.refined(torch.zeros(3, 16))
    torch.testing.assert_close(
        sae.refined(torch.cat([x, torch.full((1, 16), float("nan"))])).refinement.rates, sae.refined(x).refinement.rates
    )
