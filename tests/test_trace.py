"""What a trace offers after a forward, and how it prints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saehooks.attachments import attach, read, steer
from saehooks.errors import ConfigError
from saehooks.sae import SAE

TOKENS = torch.tensor([[0, 5, 6, 7, 8], [0, 9, 10, 11, 12]])


@pytest.fixture
def sae() -> SAE:
    torch.manual_seed(0)
    return SAE(d_in=32, d_sae=64)


@pytest.fixture
def trace(tiny_hf, sae):
    with read(tiny_hf, sae, at="model.layers.1") as trace:
        tiny_hf(TOKENS)
    return trace


def test_everything_follows_from_the_activations(trace, sae):
    """Codes, reconstruction, error and NMSE are those of the SAE on the site's activations."""
    codes = sae.encode(trace.acts)
    recons = sae.decode(codes).detach()
    assert torch.equal(trace.codes.dense(), codes.dense())
    assert torch.equal(trace.support_size, codes.support_size)
    assert torch.equal(trace.top(3).latents, codes.top(3).latents)
    assert torch.equal(trace.recons, recons)
    assert torch.equal(trace.error, trace.acts - recons)
    assert trace.nmse == pytest.approx(float(trace.error.square().sum() / trace.acts.square().sum()), rel=1e-5)
    assert torch.equal(trace.tokens, TOKENS)
    assert (trace.site, trace.start, trace.mask, trace.calls) == ("model.layers.1", 0, None, 1)
    assert torch.equal(trace.edited.values, trace.codes.values)


def test_nothing_recorded_holds_a_graph(trace):
    """Without ``grads=True`` the trace keeps no autograd graph alive."""
    assert not trace.codes.values.requires_grad
    assert not trace.edited.values.requires_grad
    assert not trace.acts.requires_grad
    assert not trace.recons.requires_grad


def test_the_last_forward_or_all(tiny_hf, sae):
    """The trace shows the last forward; with ``keep_all`` every one is in ``forwards``, in order."""
    with read(tiny_hf, sae, at="model.layers.1", keep_all=True) as trace:
        for width in (3, 5, 2):
            tiny_hf(TOKENS[:, :width])
    assert trace.codes.shape == (2, 2)
    assert trace.calls == 3
    assert [forward.codes.shape for forward in trace.forwards] == [(2, 3), (2, 5), (2, 2)]
    assert torch.equal(trace.forwards[1].tokens, TOKENS)
    with read(tiny_hf, sae, at="model.layers.1") as trace:
        tiny_hf(TOKENS)
        tiny_hf(TOKENS[:, :2])
    assert trace.codes.shape == (2, 2)
    with pytest.raises(ConfigError, match="keep_all=True"):
        _ = trace.forwards


def test_gradients_must_be_asked_for(trace):
    """Without ``grads=True`` the error shows how to ask."""
    with pytest.raises(ConfigError, match="grads=True"):
        _ = trace.grads


def test_gradients_come_with_backward(tiny_hf, sae):
    """Before ``backward`` the error says what to call; after it there is one gradient per selected latent."""
    with read(tiny_hf, sae, at="model.layers.1", grads=True) as trace:
        logits = tiny_hf(TOKENS).logits
    with pytest.raises(ConfigError, match=r"\.backward\(\)"):
        _ = trace.grads
    logits[:, -1, 7].sum().backward()
    assert trace.grads.shape == (2, 5)
    assert torch.equal(trace.grads.indices, trace.edited.indices)


def test_activations_that_the_model_overwrites(sae):
    """If a later layer writes in place over the activations, recons and error refuse; codes are still right."""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(inplace=True))
    with torch.no_grad(), read(model, sae, at="0") as trace:
        model(torch.randn(1, 3, 32))
    assert trace.support_size.shape == (1, 3)
    with pytest.raises(ConfigError, match="wrote over the activations of '0'"):
        _ = trace.error


def test_terminal_repr(tiny_hf_bridge, sae):
    """One line of summary, then tokens with support size and strongest latents."""
    with read(tiny_hf_bridge, sae, at="blocks.1.hook_resid_post") as trace:
        assert repr(trace) == "Trace('blocks.1.hook_resid_post', no forward yet)"
        tiny_hf_bridge(TOKENS)
    lines = repr(trace).splitlines()
    assert lines[0].startswith("Trace('blocks.1.hook_resid_post', batch=2, pos=5, d_sae=64, l0=")
    assert lines[1].split() == ["pos", "token", "support", "strongest", "latents"]
    place, token, size, latent, *_ = lines[3].split()
    assert (place, token, size) == ("1", "w2", str(int(trace.support_size[0, 1])))
    assert latent == str(int(trace.top(1).latents[0, 1, 0]))
    assert len(lines) == 7


def test_terminal_repr_of_a_long_text(tiny_hf, sae):
    """Only the first tokens are listed, and how many more there are."""
    with read(tiny_hf, sae, at="model.layers.1") as trace:
        tiny_hf(torch.arange(40)[None])
    assert repr(trace).splitlines()[-1].split() == ["...", "28", "more"]


def test_notebook_repr(tiny_hf_bridge, sae):
    """Every token appears, shaded by its support size, for each text of a small batch."""
    with read(tiny_hf_bridge, sae, at="blocks.1.hook_resid_post") as trace:
        assert "no forward yet" in trace._repr_html_()
        tiny_hf_bridge(TOKENS)
    html = trace._repr_html_()
    assert all(f">w{i}" in html for i in (2, 3, 4, 5, 6, 7, 8, 9))
    assert "blocks.1.hook_resid_post" in html


def test_traces_of_several_sites_print_together(tiny_bridge):
    """Each trace in turn, in terminal and notebook; images and models without tokenizer show positions."""
    saes = {f"blocks.{i}.hook_resid_post": SAE(d_in=32, d_sae=64) for i in (0, 2)}
    with attach(tiny_bridge, saes) as traces:
        tiny_bridge(TOKENS)
    for name in saes:
        assert f"Trace('{name}'" in repr(traces)
        assert name in traces._repr_html_()


def test_codes_of_an_edit_are_beside_the_originals(tiny_hf, sae):
    """``codes`` is what the SAE read, ``edited`` what the site then carried."""
    with steer(tiny_hf, sae, {5: 2.0}, at="model.layers.1") as trace:
        tiny_hf(TOKENS)
    assert torch.allclose(trace.edited.of(5) - trace.codes.of(5), torch.tensor(2.0))
