"""Attaching on the GPU path without waiting for it: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import waiting
from forced import forced

import saehooks as sh
from saehooks.attachments import attachment

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VERBS = {
    "read": lambda model, sae: sh.read(model, sae, at="0"),
    "splice": lambda model, sae: sh.splice(model, sae, at="0"),
    "splice at the last position": lambda model, sae: sh.splice(model, sae, at="0", where=sh.last),
    "splice at some positions": lambda model, sae: sh.splice(model, sae, at="0", where=sh.positions([0, 2])),
}


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).to(DEVICE).eval()


@pytest.fixture(params=["sparsemax", "topk", "gated"])
def sae(request):
    settings = {"sparsemax": {"key_scale": 6.0}, "topk": {"k": 4}, "gated": {}}[request.param]
    dictionary = "concepts" if request.param == "sparsemax" else "linear"
    return sh.SAE(16, 64, dictionary, request.param, device=DEVICE, **settings).eval()


@pytest.fixture(autouse=True)
def gpu_path():
    with forced("gpu"):
        yield


def run(verb, model, sae, x):
    with verb(model, sae) as trace, torch.no_grad():
        return model(x), trace.codes


@pytest.mark.parametrize("verb", VERBS.values(), ids=list(VERBS))
def test_a_forward_of_few_tokens_does_not_wait(model, sae, verb, monkeypatch):
    """Room for every latent gives the outputs and the codes that exact codes give; users see no padding."""
    x = torch.randn(2, 3, 16, device=DEVICE)
    with monkeypatch.context() as patched:
        patched.setattr(attachment, "FEW_SCORES", 0)
        expected, exact = run(verb, model, sae, x)
    found, codes = run(verb, model, sae, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(codes.indices, exact.indices)
    assert torch.equal(codes.values, exact.values)
    assert codes.indices.numel() == int(codes.offsets[-1])
    if sae.activation.takes_padding:
        with verb(model, sae), torch.no_grad(), waiting.never(DEVICE):
            model(x)


def test_codes_that_pile_up_take_no_more_memory_than_they_need(model, sae):
    """With ``keep_all=True`` the padding of many forwards would."""
    with sh.read(model, sae, at="0", keep_all=True) as trace, torch.no_grad():
        for _ in range(3):
            model(torch.randn(1, 2, 16, device=DEVICE))
    held = [record.codes for record in trace._records]
    assert all(codes.indices.numel() == int(codes.offsets[-1]) for codes in held)


def test_positions_that_are_not_wanted_keep_their_bits(model, sae):
    """A splice at some positions leaves the others exactly as they were."""
    x, seen = torch.randn(2, 3, 16, device=DEVICE), []
    handle = model[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
        with VERBS["splice at some positions"](model, sae):
            model(x)
    handle.remove()
    assert torch.equal(seen[0][:, 1], seen[1][:, 1])
    assert not torch.equal(seen[0][:, 2], seen[1][:, 2])


@pytest.mark.parametrize("edit", ["ablate", "clamp", "the user's own"])
def test_edits_take_no_padding(model, sae, edit):
    """Edits get codes as long as they are, where reads of so few tokens get room for every latent."""
    lengths = []

    def own(codes, context):
        lengths.append((codes.indices.numel(), int(codes.offsets[-1])))
        return codes.with_values(codes.values * 2)

    verb = {
        "ablate": lambda: sh.ablate(model, sae, [3, 5], at="0"),
        "clamp": lambda: sh.clamp(model, sae, {3: 1.0}, at="0"),
        "the user's own": lambda: sh.attach(model, sae, at="0", edits=[own]),
    }[edit]
    x = torch.randn(2, 3, 16, device=DEVICE)
    with verb(), torch.no_grad():
        expected = model(x)
    with verb(), torch.no_grad():
        assert torch.equal(model(x), expected)
    assert all(length == used for length, used in lengths)


def test_gradients_at_latents_are_asked_of_real_ones(model, sae):
    """``grads=True`` keeps gradients that can be read at the trace's codes."""
    x = torch.randn(2, 3, 16, device=DEVICE)
    with sh.splice(model, sae, at="0", grads=True) as trace:
        model(x).square().sum().backward()
    assert trace.grads.values.shape == trace.edited.values.shape
    assert trace.grads.values.abs().sum() > 0
