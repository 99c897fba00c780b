"""Every cell of the grid: constructs, trains, saves, loads, attaches, and evaluates row by row without the batch."""

from __future__ import annotations

import inspect

import pytest
import torch

import saehooks as sh
from saehooks.activations import ACTIVATIONS
from saehooks.dictionaries import DICTIONARIES
from saehooks.training.losses import LossConfig, default_loss
from saehooks.training.trainer import TrainConfig, Trainer

CELLS = [(dictionary, activation) for dictionary in DICTIONARIES for activation in ACTIVATIONS]


def cell(dictionary, activation, d_in=16, d_sae=64, **settings):
    """An SAE of one cell, small."""
    torch.manual_seed(0)
    if "k" in inspect.signature(ACTIVATIONS[activation].__init__).parameters:
        settings["k"] = 6
    if activation == "jumprelu":
        settings |= {"start_l0": 10, "bandwidth": 0.05}
    return sh.SAE(d_in, d_sae, dictionary, activation, **settings)


def rows(n=256, d_in=16, seed=0):
    """Rows from a few sparse sources, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.rand(n, 40, generator=generator) * (torch.rand(n, 40, generator=generator) < 0.1)
    return sources @ torch.randn(40, d_in, generator=torch.Generator().manual_seed(9)) + 1


@pytest.mark.parametrize(("dictionary", "activation"), CELLS)
def test_cell_trains_saves_loads_and_needs_no_batch(dictionary, activation, tmp_path):
    """A few steps lower the loss; what comes back from disk is the same SAE; in use each row stands alone."""
    sae, x = cell(dictionary, activation), rows()
    loss = LossConfig(l1=0.01) if default_loss(sae).l1 else None
    config = TrainConfig(batch_size=256, buffer_rows=512, warmup_steps=1, decay=0.0, lr=3e-3, loss=loss)
    trainer = Trainer(sae, config)
    sae.initialise(x)
    losses = [float(trainer.step(x).total.detach()) for _ in range(12)]
    assert losses[-1] < 0.95 * losses[0]

    sae.save(tmp_path)
    again = sh.load(tmp_path)
    whole = again(x[:32])
    assert torch.equal(whole.recons, sae.eval()(x[:32]).recons)
    assert torch.equal(whole.codes.indices, sae.encode(x[:32]).indices)
    before = {name: tensor.clone() for name, tensor in again.state_dict().items()}
    for row in (0, 5, 31):
        alone = again(x[row])
        torch.testing.assert_close(alone.recons, whole.recons[row], rtol=1e-4, atol=1e-5)
        assert torch.equal(alone.codes.indices, whole.codes[row].indices)
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())
    size = float(whole.codes.support_size.double().mean())
    assert 0 < size <= 64


@pytest.mark.parametrize(("dictionary", "activation"), CELLS)
def test_cell_attaches(dictionary, activation):
    """Reading is bit-identical, splicing carries the reconstruction, nothing of the SAE changes, even in train mode."""
    sae = cell(dictionary, activation).train()
    x = rows(10).reshape(2, 5, 16)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
    plain, state = model(x), {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    with sh.read(model, sae, at="0") as trace:
        assert torch.equal(model(x), plain)
    assert trace.support_size.shape == (2, 5)
    with sh.splice(model, sae, at="0") as trace:
        spliced = model(x)
    torch.testing.assert_close(spliced, model[1](trace.recons.detach()))
    assert sae.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in sae.state_dict().items())


@pytest.mark.parametrize(("dictionary", "activation"), CELLS)
def test_cell_survives_odd_rows(dictionary, activation):
    """Empty batch, zero row, NaN row: defined in train and eval mode; a broken row stays broken and alone."""
    for training in (True, False):
        sae = cell(dictionary, activation).train(training)
        empty = sae(torch.zeros(0, 3, 16))
        assert empty.recons.shape == (0, 3, 16)
        assert empty.codes.support_size.shape == (0, 3)
        assert bool(sae(torch.zeros(2, 16)).recons.isfinite().all())
        x = rows(8)
        x[3, 2] = float("nan")
        out = sae(x)
        assert bool(out.recons[3].isnan().any())
        assert bool(out.recons[[0, 1, 2, 4, 5, 6, 7]].isfinite().all())
        assert int(out.codes.support_size[3]) <= 1


def test_half_precision_cells():
    """In bfloat16 every activation encodes and decodes in bfloat16; counters stay whole, running means float32."""
    for activation in ACTIVATIONS:
        sae = cell("linear", activation, dtype=torch.bfloat16)
        out = sae.train()(rows(32))
        assert out.recons.dtype == torch.bfloat16
        assert out.codes.values.dtype == torch.bfloat16
        for name, buffer in sae.named_buffers():
            mean = "threshold" in name  # a running mean in bfloat16 would not move any more
            assert buffer.dtype in ((torch.float32,) if mean else (torch.bfloat16, torch.int64))


def test_resumed_statistics_are_in_the_state():
    """Thresholds and counts of batch-level activations are buffers, so checkpoints carry them."""
    assert {name for name, _ in cell("linear", "batchtopk").named_buffers()} == {
        "activation.threshold",
        "activation.batches",
    }
    assert {name for name, _ in cell("linear", "feature_choice").named_buffers()} == {
        "activation.thresholds",
        "activation.taken",
        "density.fired",
        "density.rows",
    }


def test_settings_names_do_not_clash():
    """Settings are routed by name, so no two parts may share one."""
    from saehooks.activations import LatentDensity
    from saehooks.sae import settings_of

    activations = set().union(*(settings_of(kind) for kind in ACTIVATIONS.values()))
    dictionaries = set().union(*(settings_of(kind) for kind in DICTIONARIES.values()))
    density = settings_of(LatentDensity)
    assert not activations & dictionaries
    assert not density & (activations | dictionaries)
