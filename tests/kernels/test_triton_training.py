"""Training steps that do not wait for the GPU: in Triton's interpreter where there is none."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from forced import forced
from waiting import Waits

from saehooks import SAE, Codes, LossConfig, TrainConfig, Trainer
from saehooks.errors import NotFiniteError
from saehooks.kernels import Capacity, Step
from saehooks.kernels import step as step_module
from saehooks.training.optimiser import TableAdam

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN):RuntimeWarning")
GRID = [
    ("concepts", "sparsemax", {"key_scale": 6.0}),
    ("concepts", "sparsemax", {"key_scale": 6.0, "values": "weight"}),
    ("concepts", "entmax", {"key_scale": 6.0, "values": "weight"}),
    ("linear", "topk", {"k": 4}),
    ("linear", "batchtopk", {"k": 4}),
    ("linear", "topk", {"k": 4, "unit_norm_decoder": True}),
    ("concepts", "entmax", {"key_scale": 6.0, "values": "weight", "learn_alpha": True}),
    ("linear", "jumprelu", {"start_l0": 4}),
    ("concepts", "relu", {}),
    ("concepts", "gated", {}),
    ("kron", "topk", {"k": 4}),
]


def trained(sae: SAE, steps: int, ahead: bool, monkeypatch, **settings) -> Trainer:
    """A few steps of 4 rows on the gpu path, with or without code buffers sized beforehand."""
    with monkeypatch.context() as patched, forced("gpu"):
        if not ahead:
            patched.setattr(step_module.Forecast, "capacity_for", lambda self, rows, d_sae: None)
        torch.manual_seed(7)
        trainer = Trainer(sae, TrainConfig(lr=0.01, warmup_steps=0, decay=0.0, log_every=100, **settings))
        for _ in range(steps):
            trainer.step(3 * torch.randn(4, 16, device=DEVICE))
        trainer.settle()
    return trainer


@pytest.mark.parametrize(("dictionary", "activation", "settings"), GRID)
def test_steps_of_a_size_fixed_beforehand_train_as_exact_ones(dictionary, activation, settings, monkeypatch):
    """Whatever the cell of the grid, room for the codes changes nothing that is learned."""
    monkeypatch.setattr(step_module, "MAX_DENSITY", torch.inf)  # room for wide codes too
    ends = []
    for ahead in (False, True):
        torch.manual_seed(0)
        sae = SAE(16, 64, dictionary, activation, device=DEVICE, **settings)
        trainer = trained(sae, 4, ahead, monkeypatch, dead_after=12)
        ends.append([*sae.state_dict().values(), trainer.idle])
    for exact, found in zip(*ends, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("dictionary", "activation", "settings"), GRID[:5])
def test_a_step_does_not_wait(dictionary, activation, settings, monkeypatch):
    """Once sizes are known, nothing in a step brings a number back but the size of the step before the last."""
    sae = SAE(16, 128, dictionary, activation, device=DEVICE, **settings)
    trainer = trained(sae, 3, True, monkeypatch, loss=LossConfig())
    x = 3 * torch.randn(4, 16, device=DEVICE)
    with forced("gpu"):
        trainer.step(x)
        trainer.step(x)
        with Waits() as waits:
            trainer.step(x)
    assert [line for line in waits.found if "step.py" not in line] == []
    assert len(waits.found) == 1


def test_a_step_that_did_not_fit_changes_nothing_and_is_made_again(monkeypatch):
    """Codes outgrow their buffer: the batch is trained on again, and no batch is lost or counts twice."""
    torch.manual_seed(0)
    sae = SAE(16, 128, device=DEVICE, key_scale=6.0)
    trainer = trained(sae, 2, True, monkeypatch)
    with torch.no_grad():
        sae.dictionary.W_k.mul_(0.1)  # smaller scores, larger supports
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    with forced("gpu"):
        trainer.step(torch.randn(4, 16, device=DEVICE))
        assert all(torch.equal(p, before[name]) for name, p in sae.named_parameters()), "it did not fit"
        updates = float(trainer.optimizer.state[sae.dictionary.C]["step"])
        trainer.settle()
    assert (trainer.repeated, trainer.steps) == (1, 3)
    assert float(trainer.optimizer.state[sae.dictionary.C]["step"]) == updates + 1 == trainer.steps
    assert not any(torch.equal(p, before[name]) for name, p in sae.named_parameters() if name.endswith(("C", "W_v")))
    assert trainer._forecast.capacity_for(4, 10**9) is None, "the next steps are selected exactly"


def test_a_step_made_again_counts_once(monkeypatch):
    """Running statistics see the batch that did not fit once, when it is trained on again, and whole."""
    torch.manual_seed(0)
    sae = SAE(16, 128, device=DEVICE, key_scale=6.0, track_density=True)
    trainer = trained(sae, 2, True, monkeypatch)
    fired = sae.density.fired.clone()
    with torch.no_grad():
        sae.dictionary.W_k.mul_(0.1)
    x = torch.randn(4, 16, device=DEVICE)
    right = fired + sae.eval().encode(x).counts()
    with forced("gpu"):
        trainer.step(x)
        assert torch.equal(sae.density.fired, fired)
        trainer.settle()
    assert trainer.repeated == 1
    assert int(sae.density.rows) == trainer.steps * 4
    assert torch.equal(sae.density.fired, right)
    assert not trainer.idle[right > fired].any()


def test_values_refined_by_conjugate_gradients_are_those_of_the_cpu():
    """On the gpu path with room for codes asked for: the same codes, as long as they are, and the same gradients."""
    found = []
    for name in ("reference", "gpu"):
        torch.manual_seed(0)
        sae, x = SAE(16, 64, device=DEVICE, key_scale=6.0).refined(2), torch.randn(4, 16, device=DEVICE)
        with forced(name):
            recons, codes = sae(x, step=Step(capacity=Capacity(4 * 64)))
            recons.square().sum().backward()
        found.append([codes.indices, codes.values, recons, *(p.grad for p in sae.parameters())])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)


def test_what_one_step_knows_does_not_reach_another_thread(monkeypatch):
    """A small capacity in use on one thread cuts nothing off on another, and each backward serves its own optimiser."""
    torch.manual_seed(0)
    sae, x = SAE(16, 128, device=DEVICE, key_scale=6.0), torch.randn(4, 16, device=DEVICE)
    mine, theirs = TableAdam(sae), TableAdam(sae)
    room, begun, done = Capacity(3), threading.Event(), threading.Event()
    cut: list[Codes] = []

    def other() -> None:
        step = theirs.kernel_step(room)
        cut.append(sae.encode(x, step=step))
        begun.set()
        done.wait(60)
        sae.decode(cut[0], step=step).sum().backward()

    with forced("gpu"):
        expected = sae.encode(x)
        thread = threading.Thread(target=other)
        thread.start()
        assert begun.wait(60)
        step = mine.kernel_step()
        recons, codes = sae(x, step=step)
        assert torch.equal(codes.indices, expected.indices)
        backward = threading.Thread(target=lambda: recons.square().sum().backward())
        backward.start()
        backward.join()
        assert [len(step.sparse_gradients.pop(p)) for p in mine.tables] == [2]
        done.set()
        thread.join()
    assert room.overflowed
    assert cut[0].trimmed().indices.numel() == 3
    assert [len(theirs.kernel_step().sparse_gradients.pop(p)) for p in theirs.tables] == [2]


def test_a_broken_loss_is_told_from_codes_that_did_not_fit(monkeypatch):
    """NaN in a batch is an error at the next look, and the parameters are as before it."""
    sae = SAE(16, 128, device=DEVICE, key_scale=6.0)
    trainer = trained(sae, 2, True, monkeypatch)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    with forced("gpu"):
        trainer.step(torch.full((4, 16), float("nan"), device=DEVICE))
        with pytest.raises(NotFiniteError):
            trainer.check_finite()
    assert all(torch.equal(p, before[name]) for name, p in sae.named_parameters())


@pytest.mark.parametrize("dictionary", ["concepts", "linear"])
def test_a_step_in_bfloat16_reads_one_copy_of_each_table(dictionary, monkeypatch):
    """Under "medium" the loss and every gradient are those of tables rounded to bfloat16; each is rounded once."""
    made: list[torch.Size] = []
    original = torch.Tensor.to

    def counted(tensor, *args, **kwargs):
        if args == (torch.bfloat16,) and tensor.dtype == torch.float32 and tensor.shape[0] == 40:
            made.append(tensor.shape)
        return original(tensor, *args, **kwargs)

    settings = {"key_scale": 4.0} if dictionary == "concepts" else {}
    sae = SAE(16, 40, dictionary, device=DEVICE, **settings)
    x = torch.randn(5, 16, device=DEVICE)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    optimizer = TableAdam(sae, lr=0.01)
    with forced("gpu"), monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "to", counted)
        step = optimizer.kernel_step()
        stages = sae.encode_stages(x, step=step)
        (sae.decode(stages.codes, step=step) - x).square().sum().backward()
    optimizer.write_gradients()
    assert len(made) == len(optimizer.tables)
    rounded = SAE(16, 40, dictionary, device=DEVICE, dtype=torch.float64, **settings)
    rounded.load_state_dict({name: t.bfloat16() if t.shape == (40, 16) else t for name, t in sae.state_dict().items()})
    prepared = rounded.dictionary.prepare(x.double())
    scores = rounded.dictionary.scores(prepared, stages.support.with_scores(None))
    codes = replace(stages.codes, values=scores, scale=prepared.scale)
    (rounded.decode(codes) - x.double()).square().sum().backward()
    for (name, p), q in zip(sae.named_parameters(), rounded.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 0.02 * q.grad.norm(), name
