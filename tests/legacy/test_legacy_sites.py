"""Sites of TransformerLens 2.18 and 3.9; run by .ci/legacy_env, each release in an environment of its own."""

from __future__ import annotations

import pytest
import torch

from saehooks.errors import SiteError, WidthError
from saehooks.hosts import host, sites

lens = pytest.importorskip("transformer_lens")
try:
    lens.HookedTransformer  # noqa: B018 - TransformerLens 4 answers with an ImportError
except (AttributeError, ImportError):
    pytest.skip("TransformerLens 4 has no HookedTransformer", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

TOKENS = torch.tensor([[0, 7, 8, 9, 10, 11, 12], [0, 20, 21, 22, 23, 24, 25]])


def hooked(tokenizer=None, **settings):
    config = lens.HookedTransformerConfig(
        d_model=32, n_layers=3, n_heads=4, d_head=8, n_ctx=64, d_vocab=64, d_mlp=48, act_fn="gelu", seed=0, **settings
    )
    return lens.HookedTransformer(config, tokenizer=tokenizer).eval()


@pytest.fixture(params=["hooked", "rotary", "bridge"])
def model(request, tiny_tokenizer):
    if request.param == "bridge":
        return request.getfixturevalue("tiny_hf_bridge")
    rotary = {"positional_embedding_type": "rotary", "rotary_dim": 8, "n_key_value_heads": 2}
    return hooked(tiny_tokenizer, **(rotary if request.param == "rotary" else {}))


@torch.no_grad()
def run(model):
    return model(TOKENS)


def test_every_listed_site_fires_with_its_width(model):
    """Each site of the table that is on fires as (batch, pos, width), and reading changes nothing."""
    run(model)
    before = run(model)
    on = [info for info in sites(model) if not info.note.startswith("off")]
    fired = {info.name: [] for info in on}
    for info in on:
        host(model).site(info.name).hook(lambda acts, name=info.name: fired[name].append(tuple(acts.shape)))
    assert torch.equal(run(model), before)
    # A HookedTransformer norms three times, for queries, keys and values; all else fires once.
    times = {info.name: len(fired[info.name]) if info.name.endswith("ln1.hook_normalized") else 1 for info in on}
    assert fired == {info.name: [(2, 7, info.width)] * times[info.name] for info in on}
    assert all(times.values())
    assert {f"blocks.1.hook_{name}" for name in ("resid_pre", "resid_mid", "resid_post", "mlp_out")} < set(fired)


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.attn.hook_k"])
def test_replacing_does_what_the_users_own_hook_does(model, name):
    """A written activation has the effect of a TransformerLens hook that writes the same."""
    site = host(model).site(name)
    delta = torch.randn(2, 7, site.width, generator=torch.Generator().manual_seed(1))
    run(model)
    handle = site.hook(lambda acts: acts + delta)
    ours = run(model)
    handle.remove()
    with torch.no_grad():
        theirs = model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda acts, hook: acts + delta.reshape(acts.shape))])
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, run(model))


def test_one_head_is_shown_alone(model):
    """``head=1`` shows d_head columns of hook_z."""
    shapes = []
    site = host(model).site("blocks.1.attn.hook_z", head=1)
    site.hook(lambda acts: (shapes.append(tuple(acts.shape)), acts * 2)[1])
    run(model)
    assert (shapes, site.width) == ([(2, 7, 8)], 8)


def test_hooks_are_gone_after_remove_and_survive_reset(model, hooks_of):
    """``reset_hooks`` leaves a site's hook; ``remove`` leaves the model's own hooks, permanent ones too, in order."""
    point = model.hook_dict["blocks.1.hook_resid_pre"]
    point.add_hook(lambda acts, hook: acts * 1.5, is_permanent=True)
    run(model)
    before, kept, own = hooks_of(model), run(model), set(vars(model))
    fired = []
    handle = host(model).site("blocks.1.hook_resid_pre").hook(lambda acts: fired.append("site"))
    model.reset_hooks()
    run(model)
    assert fired == ["site"]
    handle.remove()
    assert (hooks_of(model), set(vars(model))) == (before, own)
    assert torch.equal(run(model), kept)


def test_calls_know_tokens_and_absolute_positions(model, watched):
    """With and without KV cache, each pass of ``generate`` shows its tokens and their first position."""

    def ran(call):
        with watched(model, "blocks.1.hook_resid_post") as seen:
            out = call()
        return out, [(columns.tokens.tolist(), columns.start) for columns in seen]

    kwargs = {"max_new_tokens": 3, "do_sample": False, "verbose": False, "return_type": "tokens", "stop_at_eos": False}
    prompt = torch.tensor([[0, 4, 5, 6]])
    tokens, found = ran(lambda: model.generate(prompt, **kwargs))
    a, b, _ = tokens[0, 4:].tolist()
    assert found == [([[0, 4, 5, 6]], 0), ([[a]], 4), ([[b]], 5)]
    again, found = ran(lambda: model.generate(prompt, use_past_kv_cache=False, **kwargs))
    assert torch.equal(again, tokens)
    assert found == [([[0, 4, 5, 6]], 0), ([[0, 4, 5, 6, a]], 0), ([[0, 4, 5, 6, a, b]], 0)]
    for call in (model, model.run_with_cache, lambda text: model.run_with_hooks(text, fwd_hooks=[])):
        assert ran(lambda call=call: call("w1 w2 w3"))[1] == [([[0, 4, 5, 6]], 0)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_shown(model, watched, side):
    """A list of strings shows which columns were padded, on either side."""
    with watched(model, "blocks.1.hook_resid_post") as seen:
        model(["w1 w2 w3", "w4"], padding_side=side)
    assert seen[0].real.int().tolist() == [[1, 1, 1, 1], [0, 0, 1, 1] if side == "left" else [1, 1, 0, 0]]


def test_a_pass_stops_at_the_site(model, hooks_of):
    """Inside ``stop_at`` the model returns None right after the site, and is itself again afterwards."""
    run(model)
    before, hooks, own = run(model), hooks_of(model), set(vars(model))
    reached = []
    found = host(model)
    later = found.site("blocks.1.hook_resid_post").hook(lambda acts: reached.append(1))
    handle = found.site("blocks.0.hook_mlp_out").hook(lambda acts: reached.append(0))
    with found.stop_at(found.site("blocks.0.hook_resid_post")), torch.no_grad():
        assert found.run(TOKENS) is None
        assert model(TOKENS, return_type="loss") is None
        assert model.run_with_hooks(TOKENS, fwd_hooks=[]) is None
    assert reached == [0, 0, 0]
    handle.remove()
    later.remove()
    assert (hooks_of(model), set(vars(model))) == (hooks, own)
    assert torch.equal(run(model), before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.1.resid_pre", "did you mean 'blocks.1.hook_resid_pre'"),
        ("blocks.8.hook_resid_pre", "exists for N in 0 .. [23]"),
        ("blocks.1.attn.hook_pattern", "attention weights"),
        ("blocks.1.hook_mlp_in", r"model.set_use_hook_mlp_in\(True\)"),
        ("blocks.1.attn.hook_result", r"model.set_use_attn_result\(True\)"),
    ],
)
def test_a_wrong_name_says_what_to_write(model, name, message):
    """Names that 3.9 accepts in silence are refused, gated ones with their flag."""
    with pytest.raises(SiteError, match=message):
        host(model).site(name)


def test_a_result_of_another_shape_is_refused(model):
    """A hook that returns another shape raises at the forward pass."""
    host(model).site("blocks.1.hook_resid_pre").hook(lambda acts: acts[..., :4])
    with pytest.raises(WidthError, match=r"returned \(2, 7, 4\), but must return \(2, 7, 32\)"):
        run(model)


def test_processing_is_told(tiny_tokenizer):
    """A HookedTransformer with folded layer norms and centred writes says so."""
    raw = hooked(tiny_tokenizer, normalization_type="LN")
    assert host(raw).describe()["processing"] == {"folded": False, "centered": False}
    raw.process_weights_()
    assert host(raw).describe()["processing"] == {"folded": True, "centered": True}
