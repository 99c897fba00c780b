"""Refinement of values on the chosen support: against the formula written out densely, in every cell of the grid."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_grid import CELLS, cell, rows
from torch.autograd import forward_ad

import saehooks as sh
from saehooks.errors import ConfigError
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
        missed = target - values @ W
        change = missed @ W.T * support
        values = values + own_rates(sae, rate, missed, change @ W) * change
    return values


def own_rates(sae, rate, missed, made):
    """(rows, 1) of each row: the rate, or where steps are bounded 1.9 of the one that lowers the row's error most."""
    if sae.cfg.settings.get("refine_method") != "bounded":
        return rate.expand(len(missed), 1)
    best = (missed * made).sum(1, keepdim=True) / made.square().sum(1, keepdim=True)
    return torch.minimum(rate.expand(len(missed), 1), 1.9 * best.nan_to_num(torch.inf))


@pytest.mark.parametrize("method", ["gradient", "bounded"])
@pytest.mark.parametrize(("dictionary", "activation"), CELLS)
def test_refined_values_follow_the_formula_in_every_cell(dictionary, activation, method):
    """Two steps with rates of their own give what the dense formula gives, on the support of one pass."""
    sae, x = cell(dictionary, activation, refine=2, refine_method=method), rows(40)
    sae.initialise(x)
    with torch.no_grad():
        sae.refinement.rates.copy_(torch.tensor([0.4, 0.15]))
    codes, before = sae.eval().encode(x), plain(sae, x)
    assert torch.equal(codes.indices, before.indices)
    torch.testing.assert_close(codes.dense(), refined_densely(sae, x, before), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("rate", [0.4, 6.0])
@pytest.mark.parametrize(("dictionary", "activation"), CELLS)
def test_bounded_steps_never_enlarge_an_error(dictionary, activation, rate):
    """Whatever the rates are, no row is further off than before; the plain steps throw some far away."""
    sae, x = cell(dictionary, activation, refine=3, refine_rate=rate, refine_method="bounded"), 3 * rows(200)
    sae.initialise(x)
    bare = plain(sae, x)
    before = (sae.decode(bare) - x).norm(dim=1)
    after = (sae.eval()(x).recons - x).norm(dim=1)
    assert bool((after <= before * (1 + 1e-4) + 1e-5).all())
    assert float(after.detach().mean()) < float(before.detach().mean())


@pytest.mark.parametrize(("dictionary", "activation"), [("concepts", "sparsemax"), ("linear", "topk")])
def test_bounded_steps_below_their_bound_are_plain_ones(dictionary, activation):
    """Values and every gradient are those of gradient steps where no row's step is cut."""
    found = []
    for method in ("gradient", "bounded"):
        sae, x = cell(dictionary, activation, refine=2, refine_rate=0.05, refine_method=method), rows(40)
        sae.initialise(x)
        out = sae(x)
        (out.recons.sin().sum() + out.codes.values.cos().sum()).backward()
        gradients = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
        found.append({"values": out.codes.values.detach(), **gradients})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("refine", [0, 1, 2, "bounded"])
@pytest.mark.parametrize(("dictionary", "activation"), CELLS)
def test_encoding_that_is_decoded_next_gives_the_same(dictionary, activation, refine):
    """Passes that encoding and decoding share change neither values, reconstructions nor gradients."""
    settings = {"refine": refine} if refine else {}
    settings = {"refine": 2, "refine_method": refine} if refine == "bounded" else settings
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


REFINED = {
    "steps": {"refine": 2},
    "bounded, chosen twice": {"refine": 3, "refine_method": "bounded", "reselect": 1.4, "key_scale": 0.55},
    "conjugate": {"refine": 2, "refine_method": "conjugate"},
}


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "input alone"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", REFINED.values(), ids=REFINED)
def test_directions_that_are_made_for_refining_change_nothing(settings, training, frozen, monkeypatch):
    """With ``C W_v`` made (or kept, where no parameter learns) and without it: one reconstruction, one gradient."""
    from saehooks.dictionaries import concepts

    torch.manual_seed(0)
    sae = sh.SAE(16, 64, "concepts", "sparsemax", dtype=torch.float64, **settings)
    sae.initialise(rows(64).double())
    with torch.no_grad():
        sae.dictionary.W_v += 0.1 * torch.randn(16, 16)
    sae.train(training).requires_grad_(not frozen)
    found, made = [], []
    product = concepts.Directions
    monkeypatch.setattr(concepts, "Directions", lambda table: made.append(len(table)) or product(table))
    for looks, margin in ((1, 0.0), (0, 1e9)):
        monkeypatch.setattr(concepts, "LOOKS", 384 * looks)
        monkeypatch.setattr(concepts, "MARGIN", margin)
        x = rows(40).double().requires_grad_()
        out = sae(x)
        inputs = [x, *(p for p in sae.parameters() if p.requires_grad)]
        found.append([out.recons, *torch.autograd.grad(out.recons.sin().sum(), inputs)])
        assert len(made) == 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("settings", REFINED.values(), ids=REFINED)
def test_directions_kept_under_inference_mode_serve_gradients(settings):
    """An SAE that was read under inference_mode gives the gradients of one that was not."""
    torch.manual_seed(0)
    sae = sh.SAE(16, 64, "concepts", "sparsemax", **settings).eval().requires_grad_(False)
    fresh, found = copy.deepcopy(sae), []
    with torch.inference_mode():
        read = sae(rows(40)).recons
    for one in (sae, fresh):
        x = rows(40).requires_grad_()
        recons = one(x).recons
        found.append(torch.autograd.grad(recons.sin().sum(), x)[0])
    torch.testing.assert_close(recons.detach(), read.clone())
    assert torch.equal(*found)


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


@pytest.mark.parametrize("method", ["gradient", "conjugate"])
@pytest.mark.parametrize(
    ("dictionary", "settings"), [("concepts", {}), ("linear", {}), ("linear", {"activation": "topk", "k": 4})]
)
def test_gradients_of_refined_values(dictionary, settings, method):
    """Gradients for x, the tables and the rates agree with finite differences in float64."""
    torch.manual_seed(0)
    sae = sh.SAE(5, 12, dictionary, refine=2, refine_method=method, dtype=torch.float64, **settings)
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


# --------------------------------------------------------------- conjugate gradients


def conjugate_densely(sae, x, codes, steps):
    """Dense values and errors of each row after so many steps: the least-squares optimum over the Krylov space."""
    W = sae.directions(torch.arange(sae.d_sae)).detach().double()
    scale = torch.ones(len(x), 1) if codes.scale is None else codes.scale.detach()[:, None]
    offset = sae.dictionary.offset
    target = ((x if offset is None else x - offset.detach()) / scale).double()
    first, found = codes.dense().detach().double(), torch.zeros(len(x), sae.d_sae, dtype=torch.float64)
    for row in range(len(x)):
        chosen = codes[row].indices
        basis, start = W[chosen].T, first[row, chosen]
        missed = target[row] - basis @ start
        spanned = [basis.T @ missed]
        for _ in range(steps - 1):
            spanned.append(basis.T @ (basis @ spanned[-1]))
        space = torch.linalg.qr(torch.stack(spanned, 1))[0]
        move = torch.linalg.lstsq(basis @ space, missed[:, None], driver="gelsd").solution
        found[row, chosen] = start + (space @ move)[:, 0]
    return found, (target - found @ W).square().sum(1)


@pytest.mark.parametrize(("dictionary", "activation"), CELLS)
def test_an_sae_refined_afterwards_selects_the_same_latents(dictionary, activation):
    """In every cell: the latents of before, the errors that theory promises, none above those of before."""
    sae, x = cell(dictionary, activation), rows(40)
    sae.initialise(x)
    sae.eval()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    old, better = sae(x), sae.refined(steps=2)
    new = better(x)
    assert torch.equal(new.codes.indices, old.codes.indices)
    wanted, errors = conjugate_densely(sae, x, old.codes, 2)
    scale = 1.0 if old.codes.scale is None else old.codes.scale.detach()
    torch.testing.assert_close((x - new.recons).square().sum(1), (errors * scale**2).float(), rtol=2e-3, atol=1e-4)
    assert bool(((x - new.recons).square().sum(1) <= (x - old.recons).square().sum(1) * (1 + 1e-5) + 1e-5).all())
    if activation not in ("relu", "gated"):  # half of all latents are more than there are dimensions: values differ
        torch.testing.assert_close(new.codes.dense(), wanted.float(), rtol=5e-3, atol=2e-3)
    assert all(torch.equal(tensor, sae.state_dict()[name]) for name, tensor in before.items())
    assert ("refine" in sae.cfg.settings, better.training, list(better.state_dict())) == (False, False, list(before))


def test_ten_steps_reach_least_squares():
    """On the support of a row nothing has a smaller error than least squares; ten steps have that to a thousandth."""
    sae, x = cell("linear", "topk"), rows(60)
    sae.initialise(x)
    sae.eval()
    codes, W, offset = sae.encode(x), sae.directions(torch.arange(64)).detach(), sae.dictionary.offset.detach()
    best = []
    for row in range(len(x)):
        basis = W[codes[row].indices].T
        solved = basis @ torch.linalg.lstsq(basis, (x[row] - offset)[:, None]).solution
        best.append((x[row] - offset - solved[:, 0]).square().sum())
    least = torch.stack(best)
    ten = (x - sae.refined(10)(x).recons).square().sum(1)
    assert bool((ten >= least - 1e-4).all())
    torch.testing.assert_close(ten, least, rtol=1e-3, atol=1e-3)


def test_conjugate_gradients_train_and_come_back_from_disk(tmp_path):
    """Training lowers the loss through them; what is saved is the same; rows of zeros or NaN are no matter."""
    sae, x = cell("concepts", "sparsemax", refine=2, refine_method="conjugate"), rows(1024)
    trainer = Trainer(
        sae, TrainConfig(batch_size=256, buffer_rows=512, warmup_steps=1, decay=0.0, lr=3e-3, log_every=1)
    )
    trainer.push(x)
    trainer.drain()
    assert trainer.history[-1]["loss"] < trainer.history[0]["loss"]
    sae.eval().save(tmp_path)
    again = sh.load(tmp_path)
    assert (again.cfg.settings["refine_method"], "conjugate" in repr(again)) == ("conjugate", True)
    broken = x[:8].clone()
    broken[2], broken[5] = 0.0, float("nan")
    others = torch.tensor([0, 1, 3, 4, 6, 7])
    torch.testing.assert_close(again(broken).recons[others], sae(x[:8]).recons[others])
    assert bool(again(broken).recons[2].isfinite().all())


def test_refining_afterwards_keeps_what_is_known():
    """The site stays, figures of the SAE without it do not; half precision and inference mode are no matter."""
    sae, x = cell("concepts", "sparsemax"), rows(200)
    sae.initialise(x)
    sae.cfg.metadata |= {"hook_name": "blocks.3.hook_resid_post", "metrics": {"held_out": {"nmse": 0.5}}}
    sae.eval()
    with torch.inference_mode():
        better = sae.refined()
    assert better.hook_name == sae.hook_name
    assert "metrics" not in better.cfg.metadata
    assert better.cfg.settings["refine"] == 3
    better(x).recons.sum().backward()
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(sae).to(dtype)
        large = 300 * x[:50]  # squares beyond float16
        plain, refined = ((large - one(large).recons.float()).square().sum() for one in (half, half.refined()))
        assert refined < plain


def test_what_cannot_be_refined_afterwards_says_so():
    """An SAE that refines already, no step, and settings that conjugate gradients do not have."""
    with pytest.raises(ConfigError, match="refines its values already"):
        cell("concepts", "sparsemax", refine=1).refined()
    for steps in (0, True, 1.5):
        with pytest.raises(ConfigError, match="steps="):
            cell("concepts", "sparsemax").refined(steps)
    for more in ({"refine_rate": 0.3}, {"reselect": 1.4}, {"learn_refine_rate": False}):
        with pytest.raises(ConfigError, match="finds its own step sizes"):
            cell("concepts", "sparsemax", refine=1, refine_method="conjugate", **more)
    with pytest.raises(ConfigError, match="refine=1"):
        cell("concepts", "sparsemax", refine_method="conjugate")
    with pytest.raises(ConfigError, match="choose one of gradient, bounded, conjugate"):
        cell("concepts", "sparsemax", refine=1, refine_method="newton")
