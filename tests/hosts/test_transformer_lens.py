"""Sites of TransformerLens 4: bridges over a native model, over Llama and over GPT-2."""

from __future__ import annotations

import pytest
import torch

from saehooks.errors import SiteError, WidthError
from saehooks.hosts import host, sites

TOKENS = torch.tensor([[0, 7, 8, 9, 10, 11, 12], [0, 20, 21, 22, 23, 24, 25]])


@pytest.fixture
def gpt2_bridge(tiny_tokenizer):
    transformers = pytest.importorskip("transformers")
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    return bridges.TransformerBridge.boot_transformers("tiny", hf_model=model, tokenizer=tiny_tokenizer).eval()


@pytest.fixture(params=["tiny_bridge", "tiny_hf_bridge", "gpt2_bridge", "compatible"])
def bridge(request):
    if request.param == "compatible":
        model = request.getfixturevalue("gpt2_bridge")
        model.enable_compatibility_mode(disable_warnings=True)
        return model
    return request.getfixturevalue(request.param)


@torch.no_grad()
def run(model):
    return model(TOKENS)


def test_every_listed_site_fires_once_with_its_width(bridge):
    """Each site of the table that is on fires once per forward, as (batch, pos, width)."""
    on = [info for info in sites(bridge) if not info.note.startswith("off")]
    fired = {info.name: [] for info in on}
    for info in on:
        host(bridge).site(info.name).hook(lambda acts, name=info.name: fired[name].append(tuple(acts.shape)))
    run(bridge)
    # With norms folded in, a gated MLP computes past the inputs of its two halves.
    expected = {
        info.name: [(2, 7, info.width)] for info in on if not info.name.endswith(("in.hook_in", "gate.hook_in"))
    }
    assert {name: fired[name] for name in expected} == expected
    assert len(expected) > 30


def test_reading_changes_nothing_and_returns_the_same_tensor(bridge):
    """Hooks that return None leave outputs bit-identical, at every site at once."""
    run(bridge)
    before = run(bridge)
    for info in sites(bridge):
        if not info.note.startswith("off"):
            host(bridge).site(info.name).hook(lambda acts: None)
    assert torch.equal(run(bridge), before)


@pytest.mark.parametrize(
    "name",
    [
        "hook_embed",
        "blocks.1.hook_resid_pre",
        "blocks.1.hook_resid_mid",
        "blocks.1.hook_resid_post",
        "blocks.1.hook_attn_out",
        "blocks.1.attn.hook_in",
        "blocks.1.attn.hook_z",
        "blocks.1.attn.hook_q",
        "blocks.1.attn.hook_k",
        "blocks.1.mlp.hook_post",
        "ln_final.hook_in",
    ],
)
def test_replacing_does_what_the_users_own_hook_does(bridge, name):
    """What a site writes has the effect of a TransformerLens hook that writes the same, whatever the raw layout."""
    site = host(bridge).site(name)
    torch.manual_seed(1)
    delta = torch.randn(2, 7, site.width)
    run(bridge)
    handle = site.hook(lambda acts: acts + delta)
    ours = run(bridge)
    handle.remove()
    with torch.no_grad():
        theirs = bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda acts, hook: acts + delta.reshape(acts.shape))])
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, run(bridge))


def test_alias_and_canonical_name_are_one_site(tiny_bridge):
    """Both names give one key and the portable name; two neighbouring residual sites stay two."""
    found = host(tiny_bridge)
    old, new = found.site("blocks.1.hook_resid_pre"), found.site("blocks.1.hook_in")
    assert (old.key, old.name, new.name) == (new.key, "blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre")
    assert (new.requested_name, new.aliases) == ("blocks.1.hook_in", ("blocks.1.hook_in",))
    assert found.site("blocks.0.hook_resid_post").key != old.key
    assert found.site("blocks.1.attn.hook_z", head=1).key != found.site("blocks.1.attn.hook_z").key


def test_one_head_is_shown_and_written_alone(tiny_bridge):
    """``head=2`` shows d_head columns of hook_z, and writing them leaves the other heads as they were."""
    z, head = host(tiny_bridge).site("blocks.1.attn.hook_z"), host(tiny_bridge).site("blocks.1.attn.hook_z", head=2)
    assert (z.width, head.width) == (32, 8)
    seen = []
    head.hook(lambda acts: torch.full_like(acts, 5.0))
    z.hook(lambda acts: seen.append(acts.unflatten(-1, (4, 8))))
    plain = []
    run(tiny_bridge)
    head.module._forward_hooks.popitem(last=False)
    z.hook(lambda acts: plain.append(acts.unflatten(-1, (4, 8))))
    run(tiny_bridge)
    assert (seen[0][:, :, 2] == 5.0).all()
    others = [0, 1, 3]
    assert torch.equal(seen[0][:, :, others], plain[0][:, :, others])


def test_grouped_heads_are_counted(tiny_hf_bridge):
    """Llama's two key-value heads make hook_k 16 wide while hook_q is 32."""
    found = host(tiny_hf_bridge)
    assert (found.site("blocks.0.attn.hook_q").width, found.site("blocks.0.attn.hook_k").width) == (32, 16)
    with pytest.raises(SiteError, match=r"heads 0 \.\. 1, got head=2"):
        found.site("blocks.0.attn.hook_k", head=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.1.resid_pre", "did you mean 'blocks.1.hook_resid_pre'"),
        ("blocks.1.hook_resid_per", "did you mean 'blocks.1.hook_resid_pre'"),
        ("blocks.7.hook_resid_pre", r"'blocks.N.hook_resid_pre' exists for N in 0 .. 2"),
        ("blocks.-1.hook_resid_pre", r"exists for N in 0 .. 2"),
        ("resid_pre", "did you mean 'blocks.0.hook_resid_pre'"),
        ("blocks.1.attn.hook_pattern", "attention weights"),
        ("blocks.1.ln1.hook_scale", "one norm per token"),
        ("embed.hook_in", "token ids"),
        ("blocks.1.hook_mlp_in", r"model.set_use_hook_mlp_in\(True\)"),
        ("blocks.1.hook_attn_in", r"model.set_use_attn_in\(True\)"),
        ("blocks.1.attn.hook_result", r"model.set_use_attn_result\(True\)"),
        ("blocks.1.hook_q_input", r"model.set_use_split_qkv_input\(True\)"),
        ("zzz", r"sh.sites\(model\) lists all"),
        (8, "a site is a name"),
        (["blocks.1.hook_in"], "a site is a name"),
    ],
)
def test_a_wrong_name_says_what_to_write(tiny_bridge, name, message):
    """A name that cannot carry an SAE is refused with the right name, the reason or the flag."""
    with pytest.raises(SiteError, match=message):
        host(tiny_bridge).site(name)


def test_gated_sites_open_with_their_flag(tiny_hf_bridge):
    """Once the flag is on the site is found, fires, and is (batch, pos, heads x width) joined."""
    model = tiny_hf_bridge
    flags = ("attn_result", "hook_mlp_in", "split_qkv_input")
    for flag in flags:
        getattr(model, f"set_use_{flag}")(True)
    fired = {}
    for name in ("blocks.1.attn.hook_result", "blocks.1.hook_mlp_in", "blocks.1.hook_q_input"):
        site = host(model).site(name)
        site.hook(lambda acts, name=name, width=site.width: fired.update({name: (tuple(acts.shape), width)}))
    run(model)
    assert fired == {
        "blocks.1.attn.hook_result": ((2, 7, 128), 128),
        "blocks.1.hook_mlp_in": ((2, 7, 32), 32),
        "blocks.1.hook_q_input": ((2, 7, 128), 128),
    }


def test_hooks_are_gone_after_remove_and_survive_reset(tiny_hf_bridge, hooks_of):
    """``reset_hooks`` leaves a site's hook, and ``remove`` leaves the model's own hooks in their order."""
    model = tiny_hf_bridge
    model.add_perma_hook("blocks.1.hook_resid_pre", lambda acts, hook: acts * 1.5)
    run(model)
    before, kept = hooks_of(model), run(model)
    fired = []
    handles = [host(model).site("blocks.1.hook_in").hook(lambda acts: fired.append(1)) for _ in range(2)]
    model.reset_hooks()
    run(model)
    assert fired == [1, 1]
    handles.reverse()
    for handle in handles:
        handle.remove()
    assert hooks_of(model) == before
    assert torch.equal(run(model), kept)


def test_resid_mid_of_a_bridge_says_where_it_leads(gpt2_bridge):
    """A bridge's hook_resid_mid feeds the MLP alone; the table and the site say so, and it is so."""
    found, seen = host(gpt2_bridge), {}
    for name in ("hook_mlp_out", "hook_resid_post"):
        found.site(f"blocks.1.{name}").hook(lambda acts, name=name: seen.setdefault(name, []).append(acts))
    run(gpt2_bridge)
    site = found.site("blocks.1.hook_resid_mid")
    site.hook(lambda acts: acts + torch.linspace(0, 1, 32))
    run(gpt2_bridge)
    changes = [second - first for first, second in seen.values()]
    torch.testing.assert_close(*changes)
    assert "reaches the MLP and not the residual stream" in site.note
    assert sites(gpt2_bridge).find("1.hook_resid_mid")[0].note == site.note


def test_returned_tensor_is_cast_to_the_model(tiny_hf_bridge):
    """A float32 hook result flows on as bfloat16 in a bfloat16 model."""
    model = tiny_hf_bridge.to(torch.bfloat16)
    seen = []
    site = host(model).site("blocks.1.hook_resid_pre")
    site.hook(lambda acts: acts.float() * 2)
    site.hook(lambda acts: seen.append(acts.dtype))
    run(model)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("wrong", [lambda acts: acts[..., :-1], lambda acts: acts[0], lambda acts: 3])
def test_a_result_of_another_shape_is_refused(tiny_bridge, wrong):
    """A hook that returns something else than the shape it was given raises at the forward pass."""
    host(tiny_bridge).site("blocks.1.hook_resid_pre").hook(wrong)
    with pytest.raises(WidthError, match=r"must return \(2, 7, 32\) or None"):
        run(tiny_bridge)


@pytest.mark.bridge_cache
def test_calls_know_tokens_and_absolute_positions(tiny_hf_bridge, watched):
    """Every way of running the model shows its tokens; with a KV cache ``start`` counts what is cached."""
    prompt = tiny_hf_bridge.to_tokens("w1 w2 w3")
    assert prompt.tolist() == [[0, 4, 5, 6]]

    def ran(call):
        with watched(tiny_hf_bridge, "blocks.1.hook_resid_post") as seen:
            out = call()
        return out, [(columns.tokens.tolist(), columns.start) for columns in seen]

    kwargs = {"max_new_tokens": 3, "do_sample": False, "return_type": "tokens"}
    out, cached = ran(lambda: tiny_hf_bridge.generate(prompt, verbose=False, **kwargs))
    new = out[0, 4:].tolist()
    assert cached == [([[0, 4, 5, 6]], 0), ([[new[0]]], 4), ([[new[1]]], 5)]
    assert ran(lambda: tiny_hf_bridge.hf_generate(prompt, **kwargs))[1] == cached
    uncached = ran(lambda: tiny_hf_bridge.generate(prompt, verbose=False, use_past_kv_cache=False, **kwargs))[1]
    assert uncached == [(out[:, : 4 + i].tolist(), 0) for i in range(3)]
    whole = [([[0, 4, 5, 6]], 0)]
    assert ran(lambda: tiny_hf_bridge("w1 w2 w3"))[1] == whole
    assert ran(lambda: tiny_hf_bridge.run_with_cache("w1 w2 w3"))[1] == whole
    assert ran(lambda: tiny_hf_bridge.run_with_hooks("w1 w2 w3", fwd_hooks=[]))[1] == whole
    assert ran(lambda: tiny_hf_bridge.forward("w1 w2 w3"))[1] == whole


@pytest.mark.bridge_cache
@pytest.mark.parametrize(("side", "short"), [("left", [0, 0, 1, 1]), ("right", [1, 1, 0, 0])])
def test_padding_is_shown(tiny_hf_bridge, watched, side, short):
    """A list of strings shows which columns the bridge padded, on either side, also while it generates."""
    with watched(tiny_hf_bridge, "blocks.1.hook_resid_post") as seen:
        tiny_hf_bridge(["w1 w2 w3", "w4"], padding_side=side)
    assert seen[0].real.int().tolist() == [[1, 1, 1, 1], short]
    with watched(tiny_hf_bridge, "blocks.1.hook_resid_post") as seen:
        tiny_hf_bridge.generate(["w1 w2 w3", "w4"], max_new_tokens=3, do_sample=False, verbose=False)
    assert [columns.place.tolist() for columns in seen] == [[[0, 1, 2, 3], [-1, -1, 0, 1]], [[4], [2]], [[5], [3]]]
    assert [columns.length.tolist() for columns in seen] == [[[4], [2]]] * 3


def test_processing_tells_raw_from_processed_weights(gpt2_bridge):
    """What an SAE records differs between raw weights and compatibility mode."""
    raw = host(gpt2_bridge).describe()
    gpt2_bridge.enable_compatibility_mode(disable_warnings=True)
    processed = host(gpt2_bridge).describe()
    assert raw == {
        "family": "transformer_lens",
        "model_name": "tiny",
        "processing": {"folded": False, "centered": False},
    }
    assert processed["processing"] == {"folded": True, "centered": True}


def test_tokenizer_of_the_model(tiny_hf_bridge, tiny_bridge):
    """The host hands out the model's own tokenizer, or None."""
    assert host(tiny_hf_bridge).tokenizer is tiny_hf_bridge.tokenizer
    assert host(tiny_bridge).tokenizer is None
