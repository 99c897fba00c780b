"""The names that people try first work, or are answered with the right one."""

from __future__ import annotations

import pytest
import torch

import saehooks as sh
from saehooks.errors import ConfigError, SiteError, WidthError

SITE = "0"


@pytest.fixture
def model():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())


@pytest.fixture
def sae():
    return sh.SAE(d_in=8, d_sae=16, dictionary="linear", activation="topk", k=5, hook_name=SITE)


def test_codes_are_multiplied(sae):
    """By a number, from both sides, by one number for each position; the support stays."""
    codes = sae.encode(torch.randn(2, 3, 8)).detach()
    assert torch.equal((codes * 2).dense(), codes.dense() * 2)
    assert torch.equal((0.5 * codes).dense(), codes.dense() / 2)
    assert torch.equal((codes / 4).dense(), codes.dense() / 4)
    by_position = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.equal((codes * by_position).dense(), codes.dense() * by_position[..., None])
    assert torch.equal((codes / by_position).support_size, codes.support_size)
    with pytest.raises(WidthError, match="does not broadcast"):
        codes * torch.ones(7)
    with pytest.raises(TypeError):
        codes * "two"


def test_a_trace_says_its_l0(model, sae):
    """The mean number of latents where the block acts."""
    sizes = torch.tensor([[1.0, 1.0, 0.0]])
    with sh.read(model, sae, where=[1, 2]) as trace:
        model(torch.randn(2, 3, 4))
    assert sizes.shape == (1, 3)
    assert trace.l0 == 5.0
    assert trace.l0 == float(trace.support_size[:, 1:].double().mean())


@pytest.mark.parametrize("k", [0, 1, 3, 5, 9])
def test_keep_the_k_strongest(model, sae, k):
    """One edit leaves the k largest values of each position and zeroes the others."""
    x = torch.randn(2, 3, 4)
    with sh.attach(model, sae, edits=sh.edits.keep_top(k), where=sh.everywhere) as trace:
        model(x)
    dense = trace.codes.dense()
    kept = dense.topk(min(k, 16), dim=-1)
    expected = torch.zeros_like(dense).scatter(-1, kept.indices, kept.values) if k else torch.zeros_like(dense)
    assert torch.equal(trace.edited.dense(), expected)
    with pytest.raises(ConfigError, match="k >= 0"):
        sh.edits.keep_top(-1)


def test_spellings_of_other_libraries_are_answered():
    """`batch_topk`, `JumpReLU`, `presets.topk`: the error names ours."""
    with pytest.raises(ConfigError, match="did you mean 'batchtopk'"):
        sh.SAE(d_in=8, d_sae=16, activation="batch_topk")
    with pytest.raises(ConfigError, match="did you mean 'jumprelu'"):
        sh.SAE(d_in=8, d_sae=16, activation="JumpReLU")
    with pytest.raises(ConfigError, match="did you mean 'mutual_choice'"):
        sh.SAE(d_in=8, d_sae=16, activation="mutual-choice")
    with pytest.raises(ConfigError, match="choose one of"):
        sh.SAE(d_in=8, d_sae=16, activation="magic")
    with pytest.raises(AttributeError, match="did you mean topk_sae"):
        sh.presets.topk  # noqa: B018
    assert sh.presets.topk_sae(d_in=8, d_sae=16, k=2).cfg.activation == "topk"


def test_a_list_names_the_sae_that_knows_no_site(model, sae):
    """Which of them, and what to write; before any hook is registered."""
    with pytest.raises(SiteError, match="number 1 of the list"), sh.read(model, [sae, sh.SAE(d_in=8, d_sae=4)]):
        pass
    assert not model[0]._forward_hooks
