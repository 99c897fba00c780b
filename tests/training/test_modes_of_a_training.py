"""Modes and defaults of torch that are on around a training do not reach into it."""

import copy

import pytest
import torch

import saehooks as sh
from saehooks.errors import ConfigError
from saehooks.kernels.cpu import screen
from saehooks.training.optimiser import TableAdam

SITE = "blocks.1.hook_resid_post"
FAST = {"batch_size": 32, "buffer_rows": 128, "warmup_steps": 2, "progress": False}


def texts(n=8):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (4, 13), generator=draw) for _ in range(n)]


def fresh(**settings):
    torch.manual_seed(0)
    return sh.SAE(32, 96, **settings)


def same_weights(one, two):
    return all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("kind", [{}, {"dictionary": "linear", "activation": "topk", "k": 4}])
def test_autocast_around_a_training_changes_nothing(kind):
    """The same rows give the very same SAE inside autocast: products, gradients and updates are in its own dtype."""
    rows = torch.randn(512, 32)
    plain, inside = fresh(**kind), fresh(**kind)
    config = sh.TrainConfig(batch_size=32, buffer_rows=128, warmup_steps=2)
    for sae, on in ((plain, False), (inside, True)):
        trainer = sh.Trainer(sae, config)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            trainer.push(rows)
            trainer.drain()
            trainer.step(rows[:32])
            trainer.evaluate(rows)
    assert same_weights(plain, inside)


def test_fit_inside_inference_mode(tiny_bridge, tmp_path):
    """The whole call, held-out rows and checkpoints included, is the one outside."""
    plain, inside = fresh(), fresh()
    sh.fit(tiny_bridge, plain, texts(), SITE, eval_batches=texts(1), **FAST)
    with torch.inference_mode():
        sh.fit(tiny_bridge, inside, texts(), SITE, eval_batches=texts(1), out=tmp_path, **FAST)
        sh.Trainer(fresh(), sh.TrainConfig(batch_size=32)).step(torch.randn(32, 32))
    assert same_weights(plain, inside)
    with torch.no_grad():
        again = fresh()
        sh.fit(tiny_bridge, again, texts(), SITE, **FAST)
    assert same_weights(plain, again)


def test_rows_with_a_gradient_leave_none_behind():
    """Rows that are part of a graph of the user's are taken as numbers."""
    rows = torch.randn(64, 32, requires_grad=True)
    trainer = sh.Trainer(fresh(), sh.TrainConfig(batch_size=32, buffer_rows=64))
    trainer.push(rows * 2)
    assert trainer.steps == 1
    assert rows.grad is None


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(tiny_bridge, default):
    """Buffers, counters and moments have dtypes of their own."""
    plain, inside = fresh(), fresh()
    rows = list(sh.harvest(tiny_bridge, texts(), SITE))
    sh.fit(rows, plain, eval_batches=rows[0], **FAST)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        trainer = sh.fit(rows, inside, eval_batches=rows[0], **FAST)
    finally:
        torch.set_default_dtype(before)
    assert same_weights(plain, inside)
    assert trainer.buffer.rows.dtype == torch.float32


def test_saes_that_cannot_be_trained_say_so():
    """float16, parameters made under inference_mode, and frozen ones are errors before anything runs."""
    with pytest.raises(ConfigError, match="float16"):
        sh.Trainer(sh.SAE(32, 64, dtype=torch.float16))
    sae = fresh().requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen"):
        sh.Trainer(sae)
    with torch.inference_mode():
        cast = fresh().double()
    with pytest.raises(ConfigError, match="inference_mode"):
        sh.Trainer(cast)


def test_a_bfloat16_sae_trains(tiny_bridge):
    """Half precision with a wide range is trained as it is."""
    sae = fresh(dictionary="linear", activation="batchtopk", k=4, dtype=torch.bfloat16)
    trainer = sh.fit(tiny_bridge, sae, texts(40), SITE, **FAST)
    losses = [record["loss"] for record in trainer.history]
    assert losses[-1] < 0.8 * losses[0]
    assert sae.activation.threshold > 0


@pytest.mark.parametrize("kind", [("concepts", "sparsemax", {}), ("linear", "gated", {}), ("linear", "topk", {"k": 4})])
def test_fit_on_a_finished_sae_goes_on_from_it(tiny_bridge, tmp_path, kind):
    """Trained, loaded or copied, an SAE is fine-tuned: a tiny step leaves what it computes."""
    dictionary, activation, settings = kind
    sae, x = fresh(dictionary=dictionary, activation=activation, **settings), torch.randn(64, 32)
    sh.fit(tiny_bridge, sae, texts(), SITE, **FAST)
    sae.save(tmp_path)
    right = sae(x).recons
    for one in (sae, copy.deepcopy(sae), sh.load(tmp_path)):
        sh.fit(tiny_bridge, one, texts(), SITE, lr=1e-9, steps=1, **FAST)
        assert (one(x).recons - right).abs().max() < 1e-5 * right.abs().max()


def test_a_failed_training_leaves_the_sae_in_eval_mode(tiny_bridge):
    """Whoever catches the error does not go on with an SAE whose thresholds move with every use."""

    class Broken(list):
        def __iter__(self):
            yield from self[:4]
            raise ConnectionError

    sae = fresh()
    with pytest.raises(ConnectionError):
        sh.fit(tiny_bridge, sae, Broken(texts()), SITE, **FAST)
    assert not sae.training


def test_step_hooks_run_once():
    """A hook on the optimiser runs once a step, also when a plain Adam was made before."""
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    sae, calls = fresh(), []
    optimizer = TableAdam(sae, lr=1e-3)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    sae(torch.randn(8, 32)).recons.sum().backward()
    optimizer.step()
    assert calls == ["before", "after"]


def test_a_row_read_between_two_steps_meets_the_new_keys(monkeypatch):
    """A step that moves one latent of thousands: no read goes on with the copy of the keys made before it.

    Torch's fused Adam does not count what it changes, and a few numbers of a table do not tell of one row.
    """
    monkeypatch.setattr(screen, "MODE", "on")
    torch.manual_seed(0)
    sae, x, moved = sh.SAE(16, 8192, "linear", "topk", k=4), torch.randn(1, 16), 4097
    optimizer = TableAdam(sae, lr=10.0)
    with torch.no_grad():
        assert moved not in sae.frozen().encode(x).indices
        rows = torch.zeros(8192, 16)
        rows[moved] = -x[0].sign()  # Adam's first step is lr in each number, against the gradient's sign
        sae.W_enc.grad = rows.T
    optimizer.step()
    with torch.no_grad():
        codes = sae.frozen().encode(x)
        expected = (x @ sae.W_enc).topk(4)
    assert moved in codes.indices
    torch.testing.assert_close(codes.values.sort(descending=True).values, expected.values[0])
    assert sorted(codes.indices.tolist()) == sorted(expected.indices[0].tolist())


def test_a_step_that_changes_nothing_moves_no_running_statistic():
    """A batch whose loss is not finite leaves counts and thresholds as the parameters are left."""
    sae = fresh(dictionary="linear", activation="batchtopk", k=4, track_density=True)
    trainer = sh.Trainer(sae, sh.TrainConfig(batch_size=16, buffer_rows=64))
    trainer.step(torch.randn(16, 32))
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    with pytest.raises(sh.errors.NotFiniteError):
        trainer.step(torch.full((16, 32), 3e38))
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    assert int(sae.density.rows) == 16


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_is_trained_on_once(reentrant):
    """Activation checkpointing runs a block again for its gradients: the same steps, rows and weights as without."""
    made = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        block = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU())

        class Model(torch.nn.Module):
            def __init__(self, block=block, checkpointed=checkpointed):
                super().__init__()
                self.embed, self.block, self.checkpointed = torch.nn.Linear(8, 32), block, checkpointed

            def forward(self, x):
                x = self.embed(x)
                if self.checkpointed:
                    return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=reentrant)
                return self.block(x)

        model, sae = Model(), fresh(dictionary="linear", activation="topk", k=4)
        inputs = torch.randn(6, 4, 9, 8, generator=torch.Generator().manual_seed(2))
        with sh.train(model, sae, at="block.0", batch_size=16, buffer_rows=32, where=sh.everywhere) as trainer:
            for x in inputs:
                model(x.requires_grad_()).square().sum().backward()
        made.append((trainer.steps, trainer.rows_seen, sae, model.embed.weight.grad))
    assert made[0][:2] == made[1][:2] == (13, 216)
    assert same_weights(made[0][2], made[1][2])
    assert torch.allclose(made[0][3], made[1][3])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_harvested_nor_trained_on(tiny_hf, side, tmp_path):
    """With an attention mask the rows are those of each text alone, its first position left out."""
    lengths, ids = (13, 7, 2), texts(1)[0][:3]
    alone = []

    def keep(module, args, out):
        alone.append(out[0] if isinstance(out, tuple) else out)

    handle = tiny_hf.model.layers[1].register_forward_hook(keep)
    for row, length in zip(ids, lengths, strict=True):
        with torch.no_grad():
            tiny_hf(row[None, :length])
    handle.remove()
    right = torch.cat([acts.reshape(-1, acts.shape[-1])[1:] for acts in alone])
    padded, mask = torch.full((3, 13), 2), torch.zeros(3, 13, dtype=torch.long)
    for i, length in enumerate(lengths):
        part = slice(0, length) if side == "right" else slice(13 - length, 13)
        padded[i, part], mask[i, part] = ids[i, :length], 1
    batch = {"input_ids": padded, "attention_mask": mask}
    got = torch.cat(list(sh.harvest(tiny_hf, [batch], "model.layers.1")))
    assert got.shape == right.shape
    assert torch.allclose(got, right, atol=1e-3)
    assert sh.harvest(tiny_hf, [batch], "model.layers.1", to=tmp_path).rows == len(right)
    trainer = sh.fit(tiny_hf, fresh(), [batch] * 4, "model.layers.1", **{**FAST, "batch_size": 8})
    assert trainer.rows_seen == 4 * len(right)


@pytest.mark.parametrize(
    "kind", [("concepts", "sparsemax", {}), ("linear", "batchtopk", {"k": 4}), ("linear", "gated", {})]
)
def test_another_default_device_changes_nothing(kind, tmp_path):
    """Every tensor is made where the SAE is, or on the CPU: none where torch would put one that names no device."""
    dictionary, activation, settings = kind
    rows = torch.randn(320, 32)
    plain, inside = (fresh(dictionary=dictionary, activation=activation, **settings) for _ in range(2))
    sh.fit(rows, plain, eval_batches=rows[:64], **FAST)
    try:
        torch.set_default_device("meta")
        sh.fit(rows, inside, eval_batches=rows[:64], out=tmp_path, **FAST)
    finally:
        torch.set_default_device(None)
    assert same_weights(plain, inside)
