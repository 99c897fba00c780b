"""Ending a forward pass at a site, on every family."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn

from saehooks.hosts import host
from saehooks.hosts.method_wrapper import replaced_method

TOKENS = torch.tensor([[0, 7, 8, 9, 10, 11, 12]])


def case(request, name):
    """(model, site, a batch, a module after the site)"""
    if name == "clip":
        clip = request.getfixturevalue("tiny_clip")
        return clip, "visual.blocks.1.hook_resid_pre", torch.randn(2, 3, 16, 16), clip.visual.transformer.resblocks[1]
    if name == "text":
        clip = request.getfixturevalue("tiny_clip")
        return clip, "text.blocks.0.hook_attn_out", torch.randint(3, 64, (2, 8)), clip.transformer.resblocks[1]
    if name == "tiny_hf":
        model = request.getfixturevalue(name)
        return model, "model.layers.1", TOKENS, model.model.layers[2]
    model = request.getfixturevalue(name)
    return model, "blocks.1.attn.hook_z", TOKENS, model.blocks[2]


@pytest.fixture(params=["tiny_bridge", "tiny_hf_bridge", "tiny_hf", "clip", "text"])
def stopped(request):
    return case(request, request.param)


def test_the_call_returns_none_and_later_layers_rest(stopped, hooks_of):
    """Inside the block the model returns None right after the site; outside it runs as before, with the same hooks."""
    model, name, batch, later = stopped
    found = host(model)
    site = found.site(name)
    with torch.no_grad():
        found.run(batch)
        before, hooks = found.run(batch), hooks_of(model)
        reached, seen = [], []
        handle = later.register_forward_hook(lambda *_: reached.append(1))
        with found.stop_at(site):
            inner = site.hook(lambda acts: seen.append(tuple(acts.shape)))
            assert found.run(batch) is None
            assert found.run(batch) is None
            inner.remove()
        handle.remove()
        after = found.run(batch)
    assert (len(seen), reached) == (2, [])
    assert hooks_of(model) == hooks
    for one, other in zip(tensors(after), tensors(before), strict=True):
        assert torch.equal(one, other)


def tensors(out):
    return [one for one in (out if isinstance(out, tuple) else [out]) if isinstance(one, torch.Tensor)]


def test_direct_calls_stop_too(tiny_hf_bridge, tiny_clip):
    """The model's own calls, by ``__call__``, ``forward`` or ``run_with_hooks``, stop as ``run`` does."""
    seen = []
    with host(tiny_hf_bridge).stop_at(host(tiny_hf_bridge).site("blocks.2.hook_resid_pre")):
        hook = ("blocks.2.hook_resid_pre", lambda acts, hook: seen.append(acts.shape))
        assert tiny_hf_bridge(TOKENS, return_type="loss") is None
        assert tiny_hf_bridge.forward(TOKENS) is None
        assert tiny_hf_bridge.run_with_hooks(TOKENS, fwd_hooks=[hook]) is None
    assert len(seen) == 1
    images, text = torch.randn(1, 3, 16, 16), torch.randint(3, 64, (1, 8))
    with host(tiny_clip).stop_at(host(tiny_clip).site("visual.blocks.1.hook_resid_post")):
        assert tiny_clip(images, text) is None
        assert tiny_clip.encode_image(images, normalize=True) is None
        assert tiny_clip.visual(images) is None
        assert tiny_clip.encode_text(text).shape == (1, 16)


def test_a_pass_that_misses_the_site_runs_to_its_end(tiny_hf):
    """A submodule called by itself is not stopped: no entry point above it would catch."""
    with host(tiny_hf).stop_at(host(tiny_hf).site("model.layers.1")):
        assert tiny_hf.model(TOKENS).last_hidden_state.shape == (1, 7, 32)


def test_errors_pass_through_and_leave_nothing(tiny_hf, hooks_of):
    """An error in a hook is the user's to see, and the model's forward is itself again."""
    before = hooks_of(tiny_hf)

    def fail(acts):
        raise KeyboardInterrupt

    handle = host(tiny_hf).site("model.layers.1").hook(fail)
    with pytest.raises(KeyboardInterrupt), host(tiny_hf).stop_at(host(tiny_hf).site("model.layers.2")):
        tiny_hf(TOKENS)
    handle.remove()
    assert hooks_of(tiny_hf) == before
    assert "forward" not in vars(tiny_hf)


def test_blocks_nest_and_the_earlier_site_wins(tiny_hf):
    """With two blocks, the site that comes first in the model stops it, in either order of entering."""
    first, second = host(tiny_hf).site("model.layers.1"), host(tiny_hf).site("model.layers.2")
    for outer, inner in ((first, second), (second, first)):
        seen = []
        handle = second.hook(lambda acts, seen=seen: seen.append(1))
        with host(tiny_hf).stop_at(outer):
            with host(tiny_hf).stop_at(inner):
                assert tiny_hf(TOKENS) is None
                assert seen == []
            tiny_hf(TOKENS)
        assert seen == ([1] if outer is second else [])
        assert tiny_hf(TOKENS).logits.shape == (1, 7, 64)
        handle.remove()


def test_a_model_whose_forward_was_replaced_keeps_its_own():
    """A forward that was put on the instance before the block is there again after it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    own = model.forward
    model.forward = own
    with host(model).stop_at(host(model).site("0")):
        assert model(torch.ones(1, 2)) is None
    assert model.__dict__["forward"] is own


def test_blocks_may_end_in_any_order():
    """Whichever block ends first, the others go on, and the last one leaves the model as it was."""
    for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        model, calls = nn.Identity(), []

        def wrapping(mark, calls=calls):
            return lambda forward: lambda x: (calls.append(mark), forward(x))[1]

        blocks = [replaced_method(model, "forward", wrapping(mark)) for mark in range(3)]
        for block in blocks:
            block.__enter__()
        left = [0, 1, 2]
        for ended in order:
            calls.clear()
            assert model(5) == 5
            assert calls == left[::-1]
            blocks[ended].__exit__(None, None, None)
            left.remove(ended)
        assert "forward" not in vars(model)


def test_a_copy_made_inside_a_block_is_a_model_of_its_own():
    """A deep copy does not run the model that it was copied from."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with host(model).stop_at(host(model).site("1")):
        copied = copy.deepcopy(model)
    with torch.no_grad():
        copied[0].weight.zero_()
        copied[0].bias.fill_(1.0)
    assert copied(torch.ones(1, 2)).tolist() == [[1.0, 1.0]]


def test_a_wrapper_that_came_meanwhile_stays():
    """A forward that is put over ours inside the block is still there after it, and works."""
    model = nn.Sequential(nn.Linear(2, 2))
    with host(model).stop_at(host(model).site("0")):
        ours = model.forward
        model.forward = lambda x: ours(x)
        assert model(torch.ones(1, 2)) is None
    assert model(torch.ones(1, 2)).shape == (1, 2)


def test_a_cached_generation_after_a_stop_is_as_before(tiny_hf_bridge):
    """No cache or position of a stopped pass leaks into the next generation."""
    prompt = tiny_hf_bridge.to_tokens("w1 w2 w3")

    def generate():
        return tiny_hf_bridge.generate(prompt, max_new_tokens=5, do_sample=False, verbose=False)

    before = generate()
    with host(tiny_hf_bridge).stop_at(host(tiny_hf_bridge).site("blocks.1.hook_resid_post")):
        tiny_hf_bridge(TOKENS, use_past_kv_cache=True)
    assert torch.equal(generate(), before)


@pytest.mark.slow
def test_half_depth_costs_about_half():
    """A pass stopped at half depth takes at most 0.55 of a whole one (12 blocks of width 256, least of many times)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=704, num_hidden_layers=12, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 1000, (2, 256))

    def seconds(run):
        start = time.thread_time()
        run(tokens)
        return time.thread_time() - start

    threads, whole, half = torch.get_num_threads(), [], []
    torch.set_num_threads(1)
    with torch.no_grad():
        model(tokens)
        # In turn, so that a slow moment of the machine falls on both, and longer where it has many.
        while len(whole) < 12 or (len(whole) < 120 and min(half) > 0.55 * min(whole)):
            whole.append(seconds(model))
            with host(model).stop_at(host(model).site("model.layers.5")):
                half.append(seconds(host(model).run))
    torch.set_num_threads(threads)
    assert min(half) <= 0.55 * min(whole)
