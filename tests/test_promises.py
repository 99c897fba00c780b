"""The promises of every attachment, on every host family."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from saehooks import edits
from saehooks.attachments import ablate, attach, clamp, read, scale, splice, steer
from saehooks.errors import LatentError, NeverFiredError, SiteError, WhereError, WidthError
from saehooks.sae import SAE
from saehooks.where import last

D_SAE = 96
TOKENS = torch.tensor([[0, 5, 6, 7, 8, 9, 10, 3], [0, 11, 12, 13, 14, 15, 16, 4]])


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Case(NamedTuple):
    """One site in one host family, and a call that goes through it."""

    fixture: str
    site: str
    alias: str | None
    width: int
    call: Callable


CASES = {
    "bridge": Case("tiny_bridge", "blocks.1.hook_resid_post", "blocks.1.hook_out", 32, lambda m: m(TOKENS)),
    "bridge heads": Case("tiny_bridge", "blocks.1.attn.hook_z", None, 32, lambda m: m(TOKENS)),
    "hf bridge": Case("tiny_hf_bridge", "blocks.2.hook_resid_pre", "blocks.2.hook_in", 32, lambda m: m(TOKENS)),
    "module": Case("tiny_hf", "model.layers.1", None, 32, lambda m: m(TOKENS).logits),
    "clip visual": Case(
        "tiny_clip", "visual.blocks.1.hook_resid_post", "visual.transformer.resblocks.1", 32,
        lambda m: m.encode_image(images()),
    ),
    "clip text": Case(
        "tiny_clip", "text.blocks.0.hook_resid_post", "transformer.resblocks.0", 24, lambda m: m.encode_text(TOKENS)
    ),
}  # fmt: skip


class Host(NamedTuple):
    """A tiny model of one family, warm, with an SAE that fits its site."""

    model: torch.nn.Module
    sae: SAE
    site: str
    alias: str | None
    call: Callable


@pytest.fixture(params=CASES, ids=str)
def host(request) -> Host:
    case = CASES[request.param]
    model = request.getfixturevalue(case.fixture)
    torch.manual_seed(1)
    sae = SAE(d_in=case.width, d_sae=D_SAE, hook_name=case.site)
    case.call(model)  # a bridge registers hooks of its own at its first forward
    return Host(model, sae, case.site, case.alias, case.call)


def state(model: torch.nn.Module) -> list:
    """Everything that an attachment must leave as it was: hooks in order, flags, parameters and buffers."""
    found: list = []
    for name, module in model.named_modules():
        hooks = [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks]
        extra = [module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs]
        found += [name, module.training, "forward" in vars(module), [list(one.items()) for one in hooks + extra]]
        found += [list(getattr(module, "fwd_hooks", []))]
    for tensor in [*model.parameters(), *model.buffers()]:
        found += [id(tensor), tensor._version, tensor.requires_grad, tensor.grad is None]
    return found


def all_verbs(host: Host) -> dict:
    """Every verb, set up so that it changes something."""
    with torch.no_grad(), read(host.model, host.sae) as trace:
        host.call(host.model)
    latent = int(trace.top(1).latents.flatten().mode().values)
    return {
        "splice": splice(host.model, host.sae),
        "ablate": ablate(host.model, host.sae, latent),
        "clamp": clamp(host.model, host.sae, {latent: 30.0}),
        "scale": scale(host.model, host.sae, {latent: 40.0}),
        "steer": steer(host.model, host.sae, {latent: -30.0}),
        "attach": attach(host.model, host.sae, edits=[edits.add({0: 20.0}), edits.zero(latent)], where=slice(0, 2)),
    }


def nothing_edited(host: Host) -> dict:
    """Every verb with nothing to do."""
    return {
        "read": read(host.model, host.sae),
        "read with gradients": read(host.model, host.sae, grads=True),
        "read somewhere": read(host.model, host.sae, where=last),
        "ablate": ablate(host.model, host.sae, []),
        "clamp": clamp(host.model, host.sae, {}),
        "clamp nowhere": clamp(host.model, host.sae, {3: 9.0}, where=lambda t, codes: codes.support_size < 0),
        "splice nowhere": splice(host.model, host.sae, where=lambda t, codes: codes.support_size < 0),
        "scale": scale(host.model, host.sae, {5: 1.0}),
        "steer": steer(host.model, host.sae, {}),
        "attach": attach(host.model, host.sae, edits=[edits.add({}), lambda codes: codes]),
    }


# ---------------------------------------------------------------- 1. what is left behind


def test_1_every_verb_leaves_the_model_as_it_was(host):
    """After each block: the same hooks in the same order, the same flags, parameters, buffers and outputs."""
    before, clean = state(host.model), host.call(host.model)
    for name, block in all_verbs(host).items():
        with block:
            changed = host.call(host.model)
        assert not torch.equal(changed, clean), name
        assert state(host.model) == before, name
        assert torch.equal(host.call(host.model), clean), name


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_1_exceptions_pass_and_remove_the_hooks(host, error):
    """An exception in the block comes out as itself; nothing stays behind."""
    before = state(host.model)
    with pytest.raises(error, match="mine"), splice(host.model, host.sae):
        raise error("mine")
    assert state(host.model) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_1_exceptions_inside_the_hook_remove_the_hooks(host, error):
    """An edit that raises in the middle of a forward leaves nothing behind, in the SAE neither."""

    def failing(codes):
        raise error("mine")

    before, sae_before = state(host.model), state(host.sae)
    with pytest.raises(error, match="mine"), attach(host.model, host.sae, edits=failing):
        host.call(host.model)
    assert state(host.model) == before
    assert state(host.sae) == sae_before


def test_1_return_and_closed_generators_remove_the_hooks(host):
    """A return out of the block, a generator that is closed, and one that is forgotten, all leave nothing behind."""
    before = state(host.model)

    def returning():
        with read(host.model, host.sae):
            return host.call(host.model)

    def yielding():
        with read(host.model, host.sae):
            yield host.call(host.model)

    returning()
    assert state(host.model) == before
    generator = yielding()
    next(generator)
    assert state(host.model) != before
    generator.close()
    assert state(host.model) == before
    generator = yielding()
    next(generator)
    del generator
    gc.collect()
    assert state(host.model) == before


def test_1_a_block_that_is_never_entered_registers_nothing(host):
    """Hooks are acquired on entering, not on calling the verb."""
    before = state(host.model)
    block = splice(host.model, host.sae)
    assert state(host.model) == before
    del block


def test_1_hooks_of_the_user_stay_in_order(host):
    """Hooks that were there before, and hooks that the user adds or removes inside, are the user's to keep."""
    module = dict(host.model.named_modules())[next(n for n, m in host.model.named_modules() if n)]
    calls = []
    first = module.register_forward_hook(lambda *_: calls.append("first"))
    second = module.register_forward_hook(lambda *_: calls.append("second"))
    with read(host.model, host.sae):
        host.call(host.model)
        third = module.register_forward_hook(lambda *_: calls.append("third"))
        first.remove()
    assert [h for h in module._forward_hooks if h in (second.id, third.id)] == [second.id, third.id]
    assert first.id not in module._forward_hooks


def test_1_nothing_of_the_sae_is_touched(host):
    """Training mode, gradient flags and parameters of the SAE are as before, and hold no gradient."""
    host.sae.train()
    before = state(host.sae)
    for block in all_verbs(host).values():
        with block:
            host.call(host.model).sum().backward()
    host.model.zero_grad()
    assert state(host.sae) == before


def test_1_no_reference_to_the_model_is_kept(host):
    """When block and trace are gone, nothing of this library keeps the site's activations alive."""
    with read(host.model, host.sae) as trace:
        host.call(host.model)
    acts = weakref.ref(trace.acts)
    del trace
    gc.collect()
    assert acts() is None


def test_1_reset_hooks_inside_is_survived(tiny_hf_bridge):
    """``model.reset_hooks()`` in the block takes the user's hooks away, not the attachment."""
    sae = SAE(d_in=32, d_sae=D_SAE, hook_name="blocks.2.hook_resid_pre")
    tiny_hf_bridge(TOKENS)
    before = state(tiny_hf_bridge)
    with splice(tiny_hf_bridge, sae) as trace:
        spliced = tiny_hf_bridge(TOKENS)
        tiny_hf_bridge.reset_hooks()
        assert torch.equal(tiny_hf_bridge(TOKENS), spliced)
        assert trace.calls == 2
    assert state(tiny_hf_bridge) == before


# --------------------------------------------------------------------- 2. bit-identity


@pytest.mark.parametrize("no_grad", [True, False], ids=["no_grad", "grad"])
def test_2_empty_edits_are_bit_identical(host, no_grad):
    """``read``, and every verb with nothing to do, leave the outputs as they are, bit by bit."""
    with torch.set_grad_enabled(not no_grad):
        clean = host.call(host.model)
        for name, block in nothing_edited(host).items():
            with block:
                assert torch.equal(host.call(host.model), clean), name


def test_2_read_lets_the_very_same_tensor_flow(host):
    """The hook of ``read`` returns nothing: what comes after the site gets the object that was there."""
    block = read(host.model, host.sae)
    seen = []
    with block as trace:
        host.call(host.model)
        seen.append(trace.acts.data_ptr())
    assert trace.acts._version == 0
    assert seen


def test_2_bit_identical_with_a_hook_of_the_user_on_the_site(tiny_bridge):
    """A user's hook on the same hook point, before and inside the block, acts as if nothing were attached."""
    name, sae = "blocks.1.hook_resid_post", SAE(d_in=32, d_sae=D_SAE, hook_name="blocks.1.hook_resid_post")
    tiny_bridge(TOKENS)
    tiny_bridge.add_hook(name, lambda acts, hook: acts * 1.5)
    clean = tiny_bridge(TOKENS)
    with tiny_bridge.hooks([(name, lambda acts, hook: acts - 0.25)]):
        both = tiny_bridge(TOKENS)
    with read(tiny_bridge, sae) as trace:
        assert torch.equal(tiny_bridge(TOKENS), clean)
        with tiny_bridge.hooks([(name, lambda acts, hook: acts - 0.25)]):
            assert torch.equal(tiny_bridge(TOKENS), both)
    assert trace.calls == 2
    assert torch.equal(tiny_bridge(TOKENS), clean)


def test_2_rows_that_do_not_change_are_bit_identical(host):
    """An edit in one row of the batch leaves the other row's outputs exactly as they were."""

    def rule(tokens, codes):
        mask = torch.zeros(codes.shape, dtype=torch.bool)
        mask[0, 1] = True
        return mask

    clean = host.call(host.model)
    with steer(host.model, host.sae, {3: 50.0}, where=rule) as trace:
        edited = host.call(host.model)
    assert torch.equal(edited[1], clean[1])
    assert trace.mask.sum() == 1
    assert torch.equal(trace.edited.dense()[1], trace.codes.dense()[1])


# -------------------------------------------------------------- 3. what the site carries


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_3_a_model_in_another_dtype(host, dtype):
    """A bf16 or float64 model with an fp32 SAE: outputs in the model's dtype, empty edits still bit-identical."""
    model = host.model.to(dtype)
    call = (lambda m: m.encode_image(images().to(dtype))) if "visual" in host.site else host.call
    clean = call(model)
    for name, block in all_verbs(host._replace(call=call)).items():
        with block as trace:
            out = call(model)
        assert out.dtype == dtype, name
        assert trace.acts.dtype == dtype, name
        assert trace.codes.values.dtype == torch.float32, name
        assert not torch.equal(out, clean), name
    for name, block in nothing_edited(host).items():
        with block:
            assert torch.equal(call(model), clean), name


def test_3_the_hooked_tensor_is_not_written(host):
    """The activation that the model made is the same before and after every verb."""
    with read(host.model, host.sae) as trace:
        host.call(host.model)
    clean = trace.acts.clone()
    for name, block in all_verbs(host).items():
        with block as trace:
            host.call(host.model)
        assert torch.equal(trace.acts, clean), name


# ------------------------------------------------------------------------ 4. gradients


def test_4_gradients_are_the_models_own_under_read(host):
    """With ``grads=True`` and nothing edited, the model's parameters get exactly the gradient they get unattached."""

    def gradients():
        host.model.zero_grad()
        host.call(host.model).square().sum().backward()
        return [p.grad.clone() for p in host.model.parameters() if p.grad is not None]

    clean = gradients()
    with read(host.model, host.sae, grads=True) as trace:
        attached = gradients()
    assert all(torch.equal(a, b) for a, b in zip(clean, attached, strict=True))
    assert trace.grads.values.abs().sum() > 0


def test_4_latent_gradients_agree_with_finite_differences(host):
    """``trace.grads`` holds the effect on the metric of moving one latent at one position."""
    model, sae = host.model.to(torch.float64), host.sae.double()
    call = (lambda m: m.encode_image(images().double())) if "visual" in host.site else host.call

    def metric():
        return call(model).square().sum()

    with read(model, sae, grads=True) as trace:
        metric().backward()
    latent = int(trace.top(1).latents[0, 0, 0])
    ends = []
    for delta in (1e-3, -1e-3):  # no smaller: Llama's norms compute in fp32 whatever the model's dtype
        with torch.no_grad(), steer(model, sae, {latent: delta}, where=[0]) as moved:
            ends.append(metric())
    assert moved.edited.of(latent)[0, 0] != moved.codes.of(latent)[0, 0]
    slope = (ends[0] - ends[1]) / 2e-3
    assert torch.allclose(slope, trace.grads.of(latent)[:, 0].sum(), rtol=1e-2)


def test_4_gradients_flow_through_splice_and_edits(host):
    """Through a splice or an edit the model before the site still gets a gradient; the SAE gets none."""
    for name, block in all_verbs(host).items():
        host.model.zero_grad()
        with block:
            host.call(host.model).square().sum().backward()
        first = next(p for p in host.model.parameters() if p.grad is not None)
        assert torch.isfinite(first.grad).all(), name
        assert all(p.grad is None and p.requires_grad for p in host.sae.parameters()), name
    host.model.zero_grad()


# --------------------------------------------------------------------------- 5. errors


def refused(host: Host, block, error, message) -> None:
    """Entering a block fails with an error, before any hook is registered."""
    before = state(host.model)
    with pytest.raises(error, match=message):
        block.__enter__()
    assert state(host.model) == before


def test_5_unknown_site_is_refused(host):
    """The error suggests the site that was meant."""
    typo = host.site.replace("resid_post", "resid_pots").replace("hook_resid_pre", "resid_pre").replace("hook_z", "z")
    refused(host, read(host.model, host.sae, at=typo + "s"), SiteError, "no site .*did you mean")


def test_5_wrong_width_is_refused(host):
    """The error says both widths and where to look."""
    sae = SAE(d_in=host.sae.d_in + 1, d_sae=8)
    refused(host, read(host.model, sae, at=host.site), WidthError, f"d_in={sae.d_in}, but .* is {sae.d_in - 1} wide")


def test_5_two_saes_for_one_site_are_refused(host):
    """Also when one of them is given by an alias, or both as a list."""
    if host.alias:
        refused(host, attach(host.model, {host.site: host.sae, host.alias: host.sae}), SiteError, "two SAEs")
    refused(host, attach(host.model, [host.sae, host.sae]), SiteError, "two SAEs")


@pytest.mark.parametrize("latent", [D_SAE, -1])
def test_5_latent_out_of_range_is_refused(host, latent):
    """Every verb checks its latents against the SAE."""
    m, s = host.model, host.sae
    composed = attach(m, s, edits=[lambda c: c, edits.compose(edits.zero(latent))])
    blocks = [ablate(m, s, latent), clamp(m, s, {latent: 1.0}), scale(m, s, {latent: 1.0}), steer(m, s, {latent: 1.0})]
    for block in [*blocks, composed]:
        refused(host, block, LatentError, f"latent {latent} is out of range.* 0 to {D_SAE - 1}")


def test_5_a_mask_of_the_wrong_shape_fails_at_the_first_forward(host):
    """Its shape can only be known then; the hooks go away with the error."""
    before = state(host.model)
    with (
        pytest.raises(WhereError, match=r"where has shape \(77,\); expected"),
        read(host.model, host.sae, where=torch.ones(77, dtype=torch.bool)),
    ):
        host.call(host.model)
    assert state(host.model) == before


def test_5_a_position_that_never_comes_is_an_error(host):
    """A listed position beyond every forward would be a silent no-op."""
    before = state(host.model)
    with (
        pytest.raises(WhereError, match=r"position 99 .*never came"),
        steer(host.model, host.sae, {0: 1.0}, where=[99]),
    ):
        host.call(host.model)
    assert state(host.model) == before


# --------------------------------------------------------------- 6. generation (language models)

PROMPT = torch.tensor([[0, 5, 6, 7, 8, 9]])
RULES = {
    "everywhere": None,
    "last": last,
    "position": [2],
    "negative": [-2],
    "slice": slice(4, None),
    "mask": torch.tensor([False, True, False, True, True, False]),
    "function": lambda tokens, codes: tokens % 2 == 1,
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("family", ["module", pytest.param("bridge", marks=pytest.mark.bridge_cache)])
def test_6_the_same_tokens_with_and_without_kv_cache(request, family, rule):
    """Steering at absolute positions generates one text, however the forwards are cut up."""
    model = request.getfixturevalue("tiny_hf" if family == "module" else "tiny_hf_bridge")
    site = "model.layers.1" if family == "module" else "blocks.1.hook_resid_post"
    cache = "use_cache" if family == "module" else "use_past_kv_cache"
    torch.manual_seed(1)
    sae = SAE(d_in=32, d_sae=D_SAE)

    def generate(**options):
        return model.generate(PROMPT, max_new_tokens=8, do_sample=False, **options)

    texts = []
    for on in (True, False):
        with steer(model, sae, {7: 1.5, 30: -1.5}, at=site, where=rule, keep_all=True) as trace:
            texts.append(generate(**{cache: on}))
        widths = [forward.codes.shape[1] for forward in trace.forwards]
        steps = texts[-1].shape[1] - PROMPT.shape[1]
        assert widths == ([6] + [1] * (steps - 1) if on else [6 + i for i in range(steps)])
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], generate())


# --------------------------------------------------------------------- 7. never fired


def test_7_a_block_without_a_forward_is_an_error(host):
    """The error names the site; the hooks are gone when it comes."""
    before = state(host.model)
    with pytest.raises(NeverFiredError, match=f"'{host.site}'.*the model was not called"), read(host.model, host.sae):
        pass
    assert state(host.model) == before


def test_7_a_block_that_failed_keeps_its_own_error(host):
    """An exception of the user's is not covered by the complaint."""
    with pytest.raises(ZeroDivisionError), read(host.model, host.sae):
        1 / 0  # noqa: B018


def test_7_the_wrong_tower_is_an_error(tiny_clip):
    """The error says which call goes through the site's tower."""
    visual = SAE(d_in=32, d_sae=D_SAE, hook_name="visual.blocks.1.hook_resid_post")
    with pytest.raises(NeverFiredError, match=r"visual tower, so call model\.encode_image"), read(tiny_clip, visual):
        tiny_clip.encode_text(TOKENS)


def test_7_an_early_stop_is_an_error(tiny_bridge):
    """A forward that ended before the site is told apart from no forward at all."""
    sae = SAE(d_in=32, d_sae=D_SAE, hook_name="blocks.2.hook_resid_post")
    with pytest.raises(NeverFiredError, match="stopped before the site"), read(tiny_bridge, sae):
        tiny_bridge(TOKENS, stop_at_layer=1)


def test_7_one_silent_site_among_several_is_named(tiny_clip):
    """Each of several sites must fire."""
    saes = [
        SAE(d_in=32, d_sae=D_SAE, hook_name="visual.blocks.1.hook_resid_post"),
        SAE(d_in=24, d_sae=D_SAE, hook_name="text.blocks.1.hook_resid_post"),
    ]
    with pytest.raises(NeverFiredError, match=r"text\.blocks\.1"), attach(tiny_clip, saes):
        tiny_clip.encode_image(images())
