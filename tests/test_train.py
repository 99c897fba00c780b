"""Training through hooks: what it learns, what it leaves alone, how it survives."""

import signal
from dataclasses import replace

import pytest
import torch

import saehooks as sh
from saehooks.errors import ConfigError, FormatError, NeverFiredError, NotFiniteError, SiteError, WidthError
from saehooks.training import checkpoint
from saehooks.training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint

SITE = "blocks.1.hook_resid_post"
FAST = {"batch_size": 64, "buffer_rows": 512, "warmup_steps": 5, "progress": False}


def batches(n=20, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 64, (8, 17), generator=draw) for _ in range(n)]


def fresh(seed=0, **settings):
    torch.manual_seed(seed)
    return sh.SAE(d_in=32, d_sae=96, **settings)


def test_fit_lowers_the_held_out_error(tiny_bridge):
    """Training lowers NMSE on sequences not trained on, and the history and metadata tell of it."""
    sae, held_out = fresh(), batches(3, seed=9)
    with torch.no_grad():
        rows = torch.cat(list(sh.harvest(tiny_bridge, held_out, SITE)))
    before = sh.Trainer(sae).evaluate(rows)["nmse"]
    trainer = sh.fit(tiny_bridge, sae, batches(60), SITE, eval_batches=held_out, lr=3e-3, **FAST)
    after = sae.cfg.metadata["metrics"]["held_out"]
    assert after["nmse"] < 0.5 * before
    assert trainer.steps == 60 * 8 * 16 // 64
    assert trainer.history[-1]["eval_nmse"] == after["nmse"]
    assert sae.hook_name == "blocks.1.hook_resid_post"
    assert sae.cfg.metadata["training"]["rows"] == 60 * 8 * 16
    assert sae.cfg.metadata["family"] == "transformer_lens"
    assert not sae.training


def test_train_uses_ordinary_calls_and_leaves_their_outputs(tiny_bridge):
    """Inside a train block the model's outputs are bit-identical, and the SAE learns from them."""
    sae, data = fresh(), batches(30)
    with torch.no_grad():
        before = tiny_bridge(data[0])
        with sh.train(tiny_bridge, sae, at=SITE, batch_size=64, buffer_rows=512, lr=3e-3) as trainer:
            for tokens in data:
                out = tiny_bridge(tokens)
                if tokens is data[0]:
                    assert torch.equal(out, before)
    assert trainer.steps == 30 * 8 * 16 // 64
    losses = [record["loss"] for record in trainer.history]
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.grad is None for p in tiny_bridge.parameters())


def test_train_and_fit_make_the_same_sae(tiny_bridge):
    """The with-block and the loop are one training: the same rows give bit-identical weights."""
    one, two, data = fresh(), fresh(), batches(12)
    sh.fit(tiny_bridge, one, data, SITE, decay=0.0, **FAST)
    with sh.train(tiny_bridge, two, at=SITE, decay=0.0, batch_size=64, buffer_rows=512, warmup_steps=5):
        for tokens in data:
            tiny_bridge(tokens)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_train_works_on_inference_mode_calls(tiny_bridge):
    """A user who calls the model under inference_mode can train all the same."""
    sae = fresh()
    with sh.train(tiny_bridge, sae, at=SITE, batch_size=64, buffer_rows=256) as trainer, torch.inference_mode():
        for tokens in batches(4):
            tiny_bridge(tokens)
    assert trainer.steps == 8


def test_an_image_tower_trains_too(tiny_clip):
    """The same fit trains on images: 16 patches and CLS."""
    sae = fresh()
    images = [torch.randn(8, 3, 16, 16) for _ in range(8)]
    trainer = sh.fit(tiny_clip, sae, images, "visual.blocks.1.hook_resid_post", **FAST)
    assert trainer.rows_seen == 8 * 8 * 17
    assert sae.cfg.metadata["family"] == "open_clip"


def test_a_trained_sae_attaches_without_naming_its_site(tiny_bridge):
    """After fit an SAE knows its site, and survives a save and a load."""
    sae, tokens = fresh(), batches(1)[0]
    sh.fit(tiny_bridge, sae, batches(6), SITE, **FAST)
    with sh.read(tiny_bridge, sae) as trace:
        tiny_bridge(tokens)
    assert trace.codes.shape == (8, 17)


@pytest.mark.parametrize("activation", [{}, {"dictionary": "linear", "activation": "topk", "k": 8}])
def test_resuming_gives_the_uninterrupted_weights(tiny_bridge, tmp_path, activation):
    """A training cut off by an exception and resumed ends with bit-identical weights and history."""

    class Cut(list):
        def __iter__(self):
            yield from self[:13]
            raise ConnectionError

    whole, parts = fresh(**activation), fresh(**activation)
    settings = {**FAST, "checkpoint_every": 4, "passes": 2}
    uncut = sh.fit(tiny_bridge, whole, batches(), SITE, **settings)
    with pytest.raises(ConnectionError):
        sh.fit(tiny_bridge, parts, Cut(batches()), SITE, out=tmp_path, **settings)
    again = fresh(seed=5, **activation)
    resumed = sh.fit(tiny_bridge, again, batches(), SITE, out=tmp_path, resume=True, **settings)
    assert resumed.history == uncut.history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def signalling(number, call, times=1):
    """A hook that raises a signal in this process at its n-th call."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == call:
            for _ in range(times):
                signal.raise_signal(number)

    return hook


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("moment", "call"), [("forward", 9), ("step", 21), ("step", 58), ("step", 80)])
def test_an_interrupted_training_goes_on_bit_for_bit(tiny_bridge, tmp_path, moment, call, number):
    """Interrupted in a forward of the model, or amid a step, it ends with the weights and history of one that was not.

    The 80 steps read the buffer in rounds of 8: the first and second step are inside one, the third is the last.
    """
    whole, parts, again = fresh(), fresh(), fresh(seed=5)
    held_out, settings = batches(2, seed=9), {**FAST, "passes": 2, "eval_every": 10}
    uncut = sh.fit(tiny_bridge, whole, batches(), SITE, eval_batches=held_out, **settings)
    site = {"forward": tiny_bridge.hook_dict["blocks.0.hook_out"], "step": parts.dictionary.C}[moment]
    place = site.register_forward_hook if moment == "forward" else site.register_hook
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    handle = place(signalling(number, call))
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step \d+, .*resume=True"):
        sh.fit(tiny_bridge, parts, batches(), SITE, eval_batches=held_out, out=tmp_path, **settings)
    handle.remove()
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed = sh.fit(tiny_bridge, again, batches(), SITE, eval_batches=held_out, out=tmp_path, resume=True, **settings)
    assert resumed.history == uncut.history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_second_interruption_leaves_at_once_and_saves_nothing(tiny_bridge, tmp_path):
    """Two Ctrl-C amid a step leave in it: the checkpoint stays the one of whole steps."""
    sae = fresh()
    sae.dictionary.C.register_hook(signalling(signal.SIGINT, 13, times=2))
    with pytest.raises(KeyboardInterrupt) as caught:
        sh.fit(tiny_bridge, sae, batches(), SITE, out=tmp_path, checkpoint_every=4, **FAST)
    assert str(caught.value) == ""
    trainer = sh.Trainer(fresh(), sh.TrainConfig(batch_size=64, buffer_rows=512, warmup_steps=5, checkpoint_every=4))
    assert load_checkpoint(trainer, tmp_path)
    assert trainer.steps in (4, 8, 12)


def test_a_new_training_does_not_write_over_an_interrupted_one(tiny_bridge, tmp_path):
    """Who forgot resume=True is told before anything runs; a training that ended may be made again in its folder."""
    sae = fresh()
    sae.dictionary.C.register_hook(signalling(signal.SIGINT, 7))
    with pytest.raises(KeyboardInterrupt):
        sh.fit(tiny_bridge, sae, batches(), SITE, out=tmp_path, **FAST)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(ConfigError, match=r"interrupted after step 7.*resume=True"):
        sh.fit(tiny_bridge, fresh(), batches(), SITE, out=tmp_path, **FAST)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    sh.fit(tiny_bridge, fresh(), batches(), SITE, out=tmp_path, resume=True, **FAST)
    assert sh.fit(tiny_bridge, fresh(), batches(), SITE, out=tmp_path, **FAST).steps > 7


def test_an_interruption_before_the_first_step_keeps_an_older_checkpoint(tiny_bridge, tmp_path):
    """Who forgot resume=True and presses Ctrl-C at once has lost nothing."""
    sh.fit(tiny_bridge, fresh(), batches(6), SITE, out=tmp_path, **FAST)
    before = (tmp_path / CHECKPOINT).read_bytes()
    handle = tiny_bridge.hook_dict["blocks.0.hook_out"].register_forward_hook(signalling(signal.SIGINT, 1))
    with pytest.raises(KeyboardInterrupt):
        sh.fit(tiny_bridge, fresh(), batches(6), SITE, out=tmp_path, **FAST)
    handle.remove()
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_program_with_handlers_of_its_own_keeps_them(tiny_bridge, tmp_path):
    """Where the program handles Ctrl-C itself, training neither takes it over nor stops."""
    sae, seen = fresh(), []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        sae.dictionary.C.register_hook(signalling(signal.SIGINT, 3))
        assert sh.fit(tiny_bridge, sae, batches(6), SITE, out=tmp_path, **FAST).steps == 12
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [1]


def test_resume_refuses_other_settings(tiny_bridge, tmp_path):
    """A checkpoint of another SAE or another learning rate is not silently continued."""
    sh.fit(tiny_bridge, fresh(), batches(4), SITE, out=tmp_path, **FAST)
    with pytest.raises(FormatError, match=r"lr: saved 0\.002, now 0\.01"):
        sh.fit(tiny_bridge, fresh(), batches(4), SITE, out=tmp_path, resume=True, lr=0.01, **FAST)
    with pytest.raises(FormatError, match="d_sae: saved 96, now 64"):
        sh.fit(tiny_bridge, sh.SAE(d_in=32, d_sae=64), batches(4), SITE, out=tmp_path, resume=True, **FAST)
    with pytest.raises(ConfigError, match="out="):
        sh.fit(tiny_bridge, fresh(), batches(4), SITE, resume=True, **FAST)


def test_a_checkpoint_from_before_a_setting_goes_on_where_that_is_off(tmp_path, monkeypatch):
    """A release that adds a setting goes on with what was trained without it, unless it is asked to be otherwise."""
    written = checkpoint._settings
    config = sh.TrainConfig(batch_size=16, buffer_rows=64)
    trainer = sh.Trainer(fresh(), config)
    trainer.step(torch.randn(16, 32))
    older = written(trainer)
    del older["loss"]["energy"], older["betas"]
    monkeypatch.setattr(checkpoint, "_settings", lambda trainer: older)
    save_checkpoint(trainer, tmp_path)
    monkeypatch.setattr(checkpoint, "_settings", written)
    again = sh.Trainer(fresh(1), config)
    assert load_checkpoint(again, tmp_path)
    assert again.steps == 1
    assert torch.equal(again.sae.dictionary.C, trainer.sae.dictionary.C)
    for other in ({"loss": sh.LossConfig(energy=0.1)}, {"betas": (0.8, 0.999)}):
        with pytest.raises(FormatError, match="now"):
            load_checkpoint(sh.Trainer(fresh(1), replace(config, **other)), tmp_path)


def test_a_corrupt_checkpoint_is_an_error_that_changes_nothing(tmp_path):
    """A cut-off checkpoint file is named, and the trainer stays as it was."""
    trainer = sh.Trainer(fresh(), sh.TrainConfig(batch_size=16, buffer_rows=64))
    trainer.push(torch.randn(200, 32))
    path = save_checkpoint(trainer, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    other = sh.Trainer(fresh(1), sh.TrainConfig(batch_size=16, buffer_rows=64))
    weights = {name: value.clone() for name, value in other.sae.state_dict().items()}
    with pytest.raises(FormatError, match=CHECKPOINT):
        load_checkpoint(other, tmp_path)
    assert all(torch.equal(value, other.sae.state_dict()[name]) for name, value in weights.items())


def test_nan_activations_stop_training_and_keep_the_checkpoint(tiny_bridge, tmp_path):
    """NaN from the model stops training at once; weights stay finite and the last good checkpoint loads."""
    sae, data = fresh(), batches(20)
    calls = []

    def poison(module, args, out):
        calls.append(1)
        return torch.full_like(out, float("nan")) if len(calls) > 15 else None

    handle = tiny_bridge.hook_dict["blocks.0.hook_out"].register_forward_hook(poison)
    with pytest.raises(NotFiniteError, match="is intact"):
        sh.fit(tiny_bridge, sae, data, SITE, out=tmp_path, checkpoint_every=4, **FAST)
    handle.remove()
    assert all(p.isfinite().all() for p in sae.parameters())
    trainer = sh.Trainer(fresh(), sh.TrainConfig(**{k: v for k, v in FAST.items() if k != "progress"}))
    assert load_checkpoint(trainer, tmp_path)
    assert 0 < trainer.steps <= 30


def test_an_infinite_loss_leaves_the_parameters_alone():
    """A batch whose loss overflows raises and changes no parameter."""
    sae = fresh(dictionary="linear", activation="topk", k=8)
    trainer = sh.Trainer(sae, sh.TrainConfig(batch_size=16, buffer_rows=64))
    trainer.step(torch.randn(16, 32))
    before = [p.detach().clone() for p in sae.parameters()]
    with pytest.raises(NotFiniteError, match="step 2"):
        trainer.step(torch.full((16, 32), 3e38))
    assert all(torch.equal(a, b) for a, b in zip(before, sae.parameters(), strict=True))
    trainer.step(torch.randn(16, 32))
    assert trainer.steps == 2


def test_dead_latents_are_counted_by_rows_since_they_fired():
    """A latent is dead once it has been silent for dead_after rows, and alive again when it fires."""
    sae = fresh(dictionary="linear", activation="topk", k=1)
    trainer = sh.Trainer(sae, sh.TrainConfig(batch_size=16, buffer_rows=64, dead_after=48, lr=1e-9))
    same = torch.randn(1, 32).expand(16, 32).contiguous()
    for expected in (0, 0, 95):
        trainer.step(same)
        assert trainer.dead == expected


def test_learning_rate_rises_and_falls():
    """It rises over the warm-up, stays, and falls to nearly 0 over the last share of the steps."""
    trainer = sh.Trainer(fresh(), sh.TrainConfig(batch_size=16, buffer_rows=64, warmup_steps=4, decay=0.5, steps=20))
    seen = []
    for _ in range(20):
        trainer.step(torch.randn(16, 32))
        seen.append(trainer.optimizer.param_groups[0]["lr"] / 2e-3)
    assert seen[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert seen[4:10] == pytest.approx([1.0] * 6)
    assert seen[-1] == pytest.approx(0.1)
    assert seen == sorted(seen[:5]) + sorted(seen[5:], reverse=True)


def test_steps_stop_the_training(tiny_bridge):
    """With steps given, fit stops there, whatever data is left."""
    trainer = sh.fit(tiny_bridge, fresh(), batches(30), SITE, steps=7, **FAST)
    assert trainer.steps == 7
    assert trainer.finished


def test_bad_requests_fail_before_anything_runs(tiny_bridge):
    """Unknown sites, widths and settings are errors on entering, and a block that never fires says so."""
    with pytest.raises(SiteError):
        sh.fit(tiny_bridge, fresh(), batches(1), "blocks.1.resid_post", **FAST)
    with pytest.raises(SiteError, match="at="):
        sh.fit(tiny_bridge, fresh(), batches(1), **FAST)
    with pytest.raises(WidthError, match="is 32 wide"):
        sh.fit(tiny_bridge, sh.SAE(d_in=8, d_sae=16), batches(1), SITE, **FAST)
    with pytest.raises(ConfigError, match="learning_rate"):
        sh.fit(tiny_bridge, fresh(), batches(1), SITE, learning_rate=1.0)
    with pytest.raises(ConfigError, match="lr > 0"):
        sh.TrainConfig(lr=-1.0)
    with pytest.raises(NeverFiredError, match="nothing was trained"), sh.train(tiny_bridge, fresh(), at=SITE):
        pass


@pytest.mark.parametrize(
    ("given", "more", "said"),
    [
        ([], {}, "no activation came"),
        (iter(()), {}, "no activation came"),
        (batches(1), {"where": torch.zeros(17, dtype=torch.bool)}, "no activation came"),
        (batches(1), {"batch_size": 200}, "128 activations do not fill a batch of 200"),
        ("w1 w2 w3", {}, r"sh\.TokenBatches"),
        (batches(1), {"eval_batches": []}, "eval_batches="),
        (batches(1), {"eval_batches": "w1 w2"}, r"sh\.TokenBatches"),
    ],
)
def test_too_little_to_train_on_is_an_error(tiny_bridge, tmp_path, given, more, said):
    """An SAE that nothing was trained of is neither returned nor saved: what was given, and what to give, is said."""
    with pytest.raises(ConfigError, match=said):
        sh.fit(tiny_bridge, fresh(), given, SITE, out=tmp_path, **{**FAST, **more})
    assert not list(tmp_path.iterdir())


def test_a_block_with_too_little_to_train_on_is_an_error(tiny_bridge):
    """The with-block says so on leaving."""
    with pytest.raises(ConfigError, match="batch_size="), sh.train(tiny_bridge, fresh(), at=SITE, batch_size=200):
        tiny_bridge(batches(1)[0])


def test_a_finished_training_says_how_many_steps_it_took(tiny_bridge):
    """Batches of unequal length make fewer steps than the first one promised; at the end it is not "7/8"."""
    trainer = sh.fit(tiny_bridge, fresh(), [*batches(3), batches(1)[0][:3]], SITE, **FAST)
    assert repr(trainer).startswith(f"Trainer(step {trainer.steps}/{trainer.steps},")
