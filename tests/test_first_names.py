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


CALLS = {
    "read": lambda model, sae, **given: sh.read(model, sae, **given).__enter__(),
    "measure": lambda model, sae, **given: sh.measure(model, sae, [], **given),
    "train": lambda model, sae, **given: sh.train(model, sae, **given).__enter__(),
    "fit": lambda model, sae, **given: sh.fit(model, sae, [], **given),
    "survey": lambda model, sae, **given: sh.survey(model, sae, [], **given),
    "harvest": lambda model, sae, **given: sh.harvest(model, [], **given),
    "rank_latents": lambda model, sae, **given: sh.rank_latents(model, sae, torch.ones(1, 2), **given),
    "ablate_sets": lambda model, sae, **given: sh.causal.ablate_sets(model, sae, torch.ones(1, 2), **given),
    "curve": lambda model, sae, **given: sh.causal.curve(model, sae, torch.ones(1, 2), [1], **given),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("theirs", "ours"), [("hook_name", "at"), ("layer", "at"), ("hook_point", "at"), ("positions", "where")]
)
def test_keywords_of_other_libraries_are_answered(model, sae, call, theirs, ours):
    """``hook_name=``, ``layer=``, ``positions=``: every function that has ours says which it is, before it runs."""
    with pytest.raises(TypeError, match=f"no keyword {theirs}=; did you mean {ours}=") as caught:
        call(model, sae, **{theirs: SITE})
    assert isinstance(caught.value, ConfigError)
    assert not model[0]._forward_hooks


def test_a_graph_answers_keywords_too(model, sae):
    """Its sites stand in the mapping of SAEs; positions are `where=` there too."""
    with pytest.raises(ConfigError, match="did you mean where="):
        sh.causal.latent_graph(model, {"0": sae, "1": sae}, torch.ones(1, 2), positions=[0])


def test_saelens_from_pretrained_is_answered():
    """The error is the line to write."""
    with pytest.raises(ConfigError, match=r"write sh\.load\('gpt2-small-res-jb', 'blocks\.8\.hook_resid_pre'\)"):
        sh.SAE.from_pretrained("gpt2-small-res-jb", "blocks.8.hook_resid_pre")


def test_activations_of_ones_own(sae):
    """``sh.fit(activations, sae)`` trains on a tensor; with the two exchanged, or `train`, the error says so."""
    new = sh.SAE(d_in=8, d_sae=16)
    trainer = sh.fit(torch.randn(512, 8), new, batch_size=64, progress=False)
    assert trainer.rows_seen == 512
    with pytest.raises(ConfigError, match=r"expected an SAE, or several by name.*got Tensor"):
        sh.fit(new, torch.randn(512, 8))
    with pytest.raises(ConfigError, match=r"sh\.fit\(activations, sae\)"), sh.train(torch.randn(512, 8), sae):
        pass


def test_a_list_names_the_sae_that_knows_no_site(model, sae):
    """Which of them, and what to write; before any hook is registered."""
    with pytest.raises(SiteError, match="number 1 of the list"), sh.read(model, [sae, sh.SAE(d_in=8, d_sae=4)]):
        pass
    assert not model[0]._forward_hooks
