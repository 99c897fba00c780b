"""KL fine-tuning: one step against plain torch hooks, what it buys, what it leaves alone, what it refuses."""

import copy

import pytest
import torch

import saehooks as sh
from saehooks.errors import ConfigError, NeverFiredError, NotFiniteError
from saehooks.training.losses import LossConfig

SITE, LAYER = "model.layers.1", 1


def texts(n=6, seed=0, shape=(4, 12)):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, shape, generator=draw) for _ in range(n)]


def trained(model, at=SITE, **settings):
    torch.manual_seed(0)
    sae = sh.SAE(d_in=32, d_sae=96, **settings)
    sh.fit(model, sae, texts(30, 5), at, batch_size=64, buffer_rows=256, warmup_steps=5, lr=3e-3, progress=False)
    return sae


def plain_step(model, sae, ids, mask, mix, lr):
    """The same step by torch's hooks and Adam: (loss, KL, parameters after it)."""
    sae = copy.deepcopy(sae).train()
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr, betas=(0.9, 0.999))
    inside = mask.bool().clone()
    inside[torch.arange(len(ids)), mask.long().argmax(1)] = False  # all but the first token of each text
    kept = {}

    def splice(module, args, output):
        acts = output[0] if isinstance(output, tuple) else output
        rows = acts[inside].detach()
        kept["rows"], kept["recons"] = rows, sae(rows).recons
        new = acts.clone()
        new[inside] = kept["recons"]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with torch.no_grad():
        clean = model(ids, attention_mask=mask).logits.log_softmax(-1)
    handle = model.model.layers[LAYER].register_forward_hook(splice)
    spliced = model(ids, attention_mask=mask).logits.log_softmax(-1)
    handle.remove()
    each = (clean.exp() * (clean - spliced)).sum(-1)
    both = (mask[:, :-1] * mask[:, 1:]).bool()
    kl = each[:, :-1][both].mean()
    energy = (kept["rows"] - sae.dictionary.offset).detach().square().sum(1)
    own = ((kept["recons"] - kept["rows"]).square().sum(1) / energy).mean()
    total = (1 - mix) * kl + mix * own * (kl / own).detach()
    grads = torch.autograd.grad(total, list(sae.parameters()), allow_unused=True)
    for p, grad in zip(sae.parameters(), grads, strict=True):
        p.grad = grad
    optimizer.step()
    return float(total.detach()), float(kl.detach()), dict(sae.named_parameters())


@pytest.mark.parametrize("settings", [{}, {"refine": 1}, {"dictionary": "linear", "activation": "topk", "k": 6}])
@pytest.mark.parametrize("mix", [0.0, 0.4])
def test_a_step_is_that_of_plain_torch(tiny_hf, settings, mix):
    """Loss, divergence and every parameter after a step, with a text padded on the left."""
    sae = trained(tiny_hf, **settings)
    ids, mask = texts(1)[0], torch.ones(4, 12, dtype=torch.int64)
    mask[1, :4] = 0
    loss, kl, right = plain_step(tiny_hf, sae, ids, mask, mix, 1e-3)
    options = {"objective": "kl", "mix": mix, "lr": 1e-3, "warmup_steps": 0, "decay": 0.0, "loss": LossConfig()}
    with sh.train(tiny_hf, sae, **options) as trainer, torch.no_grad():
        tiny_hf(ids, attention_mask=mask)
    record = trainer.history[-1]
    assert record["loss"] == pytest.approx(loss, rel=1e-4)
    assert record["kl"] == pytest.approx(kl, rel=1e-4)
    assert record["rows"] == 3 * 11 + 7
    for name, value in sae.named_parameters():
        torch.testing.assert_close(value, right[name], rtol=1e-3, atol=2e-5)


def test_it_lowers_the_divergence_of_held_out_texts(tiny_hf):
    """`measure`, which knows nothing of the training, finds a smaller divergence at no larger L0."""
    sae, held_out = trained(tiny_hf), texts(4, seed=9)
    before = sh.measure(tiny_hf, sae, held_out)
    with sh.train(tiny_hf, sae, objective="kl", lr=1e-3, warmup_steps=2, steps=60) as trainer:
        for ids in texts(80, seed=3):
            tiny_hf(ids)
    after = sh.measure(tiny_hf, sae, held_out)
    assert trainer.steps == 60  # the calls after them are the model's own
    assert after["kl"] < 0.9 * before["kl"]
    assert after["l0"] < 1.1 * before["l0"]
    training = sae.cfg.metadata["training"]
    assert (training["objective"], training["mix"], training["steps"]) == ("kl", 0.5, 60)
    assert not sae.training


@pytest.mark.parametrize("ask", ["plain", "loss", "inference", "grad"])
def test_the_model_and_its_outputs_are_left_alone(tiny_bridge, hooks_of, ask):
    """Outputs are the model's own to the last bit, however it is called; no gradient reaches the model."""
    sae, ids = trained(tiny_bridge, "blocks.1.hook_resid_post"), texts(1)[0]
    kwargs = {"return_type": "loss"} if ask == "loss" else {}
    with torch.no_grad():
        right = tiny_bridge(ids, **kwargs)
    hooks, flags = hooks_of(tiny_bridge), [p.requires_grad for p in tiny_bridge.parameters()]
    mode = {"inference": torch.inference_mode, "grad": torch.enable_grad}.get(ask, torch.no_grad)
    state = torch.get_rng_state()
    with sh.train(tiny_bridge, sae, objective="kl", lr=1e-3) as trainer, mode():
        found = [tiny_bridge(ids, **kwargs) for _ in range(2)]
    assert trainer.steps == 2
    assert all(torch.equal(one, right) for one in found)
    assert torch.equal(state, torch.get_rng_state())
    assert hooks_of(tiny_bridge) == hooks
    assert [p.requires_grad for p in tiny_bridge.parameters()] == flags
    assert all(p.grad is None for p in tiny_bridge.parameters())


def test_both_runs_are_under_the_users_autocast(tiny_hf):
    """Under autocast the spliced run computes as the clean one does: the divergence is the one that `measure` finds."""
    sae, ids, dtypes = trained(tiny_hf), texts(1)[0], []
    tiny_hf.lm_head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        right = sh.measure(tiny_hf, sae, [ids])["kl"]
        dtypes.clear()
        with sh.train(tiny_hf, sae, objective="kl", lr=1e-3) as trainer:
            tiny_hf(ids)
    assert dtypes == [torch.bfloat16] * 2
    assert trainer.history[-1]["kl"] == pytest.approx(right, rel=2e-3)
    assert all(p.dtype == torch.float32 for p in sae.parameters())


def test_a_block_around_it_records_the_users_calls_alone(tiny_hf):
    """`read` sees one forward for each call, not the run that is added."""
    sae = trained(tiny_hf)
    with sh.read(tiny_hf, sae, keep_all=True) as trace, sh.train(tiny_hf, sae, objective="kl", lr=1e-3):
        for ids in texts(3):
            tiny_hf(ids)
    assert trace.calls == 3


def test_checkpointed_models_train_alike(tiny_hf):
    """With activation checkpointing the SAE ends where it ends without."""
    ends = []
    for checkpointed in (False, True):
        sae = trained(tiny_hf)
        if checkpointed:
            tiny_hf.gradient_checkpointing_enable({"use_reentrant": False})
            for module in tiny_hf.modules():  # checkpoints are made in train mode alone; there is no dropout
                module.training = True
        with sh.train(tiny_hf, sae, objective="kl", lr=1e-3, warmup_steps=0) as trainer:
            for ids in texts(3):
                tiny_hf(ids, use_cache=False)
        assert trainer.rows_seen == 3 * 4 * 11
        ends.append(sae.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-3, atol=1e-5)
    tiny_hf.gradient_checkpointing_enable({"use_reentrant": True})
    tiny_hf.enable_input_require_grads()
    inside = trained(tiny_hf, "model.layers.1.mlp")
    with pytest.raises(ConfigError, match="use_reentrant=False"), sh.train(tiny_hf, inside, objective="kl"):
        tiny_hf(texts(1)[0], use_cache=False)


def test_what_is_refused(tiny_hf, tiny_clip):
    """A model without logits, a wrong objective or mix, a cache, embeddings, no call: each says what to write."""
    sae, ids = trained(tiny_hf), texts(1)[0]
    visual = sh.SAE(32, 64, hook_name="visual.blocks.1.hook_resid_post")
    with pytest.raises(ConfigError, match="without logits"), sh.train(tiny_clip, visual, objective="kl"):
        pass
    with pytest.raises(ConfigError, match="objective='ce': choose"), sh.train(tiny_hf, sae, objective="ce"):
        pass
    with pytest.raises(ConfigError, match="mix=1"), sh.train(tiny_hf, sae, objective="kl", mix=1):
        pass
    with pytest.raises(NeverFiredError, match="no call"), sh.train(tiny_hf, sae, objective="kl"):
        pass
    with pytest.raises(ConfigError, match="needs token ids"), sh.train(tiny_hf, sae, objective="kl"):
        tiny_hf(inputs_embeds=tiny_hf.get_input_embeddings()(ids))
    with pytest.raises(ConfigError, match="nothing is predicted"), sh.train(tiny_hf, sae, objective="kl"):
        tiny_hf(ids[:, :1])
    cache = tiny_hf(ids, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="KV cache"), sh.train(tiny_hf, sae, objective="kl"):
        tiny_hf(ids, past_key_values=cache)


def test_a_loss_that_is_not_finite_changes_nothing(tiny_hf):
    sae = trained(tiny_hf)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    with torch.no_grad():
        tiny_hf.lm_head.weight[7] = float("nan")
    with pytest.raises(NotFiniteError), sh.train(tiny_hf, sae, objective="kl", lr=1e-3):
        tiny_hf(texts(1)[0])
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
