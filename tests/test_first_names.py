"""The names that people try first work, or are answered with the right one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import saehooks as sh
from saehooks.errors import ConfigError, LatentError, SiteError, UnknownNameError, WidthError

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


def trace_of(model, sae):
    with sh.read(model, sae) as trace:
        model(torch.randn(2, 3, 4))
    return trace


def entered(block):
    with block:
        pass


NAMES = [
    # functions and classes
    (lambda m, s: sh.load_sae("x"), UnknownNameError, r"sh\.load\("),
    (lambda m, s: sh.SparseAutoencoder(d_in=8, d_sae=16), UnknownNameError, r"sh\.SAE\("),
    (lambda m, s: sh.add_sae(m, s), UnknownNameError, r"sh\.splice\("),
    (lambda m, s: sh.run_with_cache(m, s), UnknownNameError, r"sh\.read\("),
    (lambda m, s: sh.features, UnknownNameError, r"sh\.survey\("),
    (lambda m, s: sh.tokns, UnknownNameError, "did you mean tokens"),
    (lambda m, s: sh.SAE.load_from_disk("x"), UnknownNameError, r"sh\.load\("),
    (lambda m, s: sh.LatentIndex("folder"), ConfigError, r"LatentIndex\.load\('folder'\)"),
    # attributes
    (lambda m, s: s.use_error_term, UnknownNameError, "error='keep'"),
    (lambda m, s: setattr(s, "use_error_term", True), UnknownNameError, "error='keep'"),
    (lambda m, s: setattr(s, "W_dec", torch.zeros(1)), UnknownNameError, "write sae.dictionary.W_dec = ..."),
    (lambda m, s: s.hook_sae_acts_post, UnknownNameError, r"trace\.codes"),
    (lambda m, s: s.cfg.hook_name, UnknownNameError, r"sae\.hook_name"),
    (lambda m, s: s.cfg.k, UnknownNameError, r"cfg\.settings\['k'\]"),
    (lambda m, s: s(torch.randn(3, 8)).feature_acts, UnknownNameError, r"\.codes"),
    (lambda m, s: sh.SAE(d_in=8, d_sae=16).W_dec, UnknownNameError, r"sae\.directions\(latents\)"),
    (lambda m, s: trace_of(m, s).feature_acts, UnknownNameError, r"trace\.codes"),
    (lambda m, s: trace_of(m, s).sae_out, UnknownNameError, r"trace\.recons"),
    (lambda m, s: trace_of(m, s)["hook_sae_acts_post"], ConfigError, r"trace\.codes"),
    (lambda m, s: trace_of(m, {"0": s, "1": s}).codes, UnknownNameError, r"traces\['0'\]\.codes"),
    # codes are no tensor
    (lambda m, s: trace_of(m, s).codes.topk(3), UnknownNameError, r"codes\.top\(k\)"),
    (lambda m, s: trace_of(m, s).codes.to_dense(), UnknownNameError, r"codes\.dense\(\)"),
    (lambda m, s: trace_of(m, s).codes[0, 1, 5], LatentError, r"codes\.of\(latent\)"),
    (lambda m, s: trace_of(m, s).codes[:, :, 5], LatentError, r"codes\.of\(latent\)"),
    (lambda m, s: trace_of(m, s).codes.of([1, 2]), LatentError, "one latent"),
    (lambda m, s: trace_of(m, s).codes > 0, TypeError, "no tensor"),
    (lambda m, s: trace_of(m, s).codes != 0, TypeError, "no tensor"),
    (lambda m, s: trace_of(m, s).codes == torch.zeros(2, 3), TypeError, "no tensor"),
    (lambda m, s: trace_of(m, s).codes + 1, TypeError, "no tensor"),
    (lambda m, s: trace_of(m, s).codes @ torch.zeros(16, 2), TypeError, r"sae\.decode\(codes\)"),
    # settings
    (lambda m, s: sh.SAE(d_model=8, d_sae=16), TypeError, "did you mean d_in="),
    (lambda m, s: sh.SAE(d_in=8, dict_size=16), TypeError, "did you mean d_sae="),
    (lambda m, s: sh.SAE(d_in=8, expansion_factor=4), TypeError, r"d_sae=4 \* d_in"),
    (lambda m, s: sh.SAE(d_in=8, d_sae=16, architecture="topk", k=2), TypeError, "did you mean activation="),
    (lambda m, s: sh.SAE(d_in=8, d_sae=16, dtype="float16"), ConfigError, r"torch\.float16"),
    (lambda m, s: sh.fit(m, s, [torch.randn(2, 3, 4)], epochs=2), TypeError, "did you mean passes="),
    (lambda m, s: sh.fit(m, s, [torch.randn(2, 3, 4)], learning_rate=0.1), TypeError, "did you mean lr="),
    # what is given
    (lambda m, s: s.encode(torch.zeros(2, 8, dtype=torch.int64)), WidthError, r"floating tensor.*torch\.int64"),
    (lambda m, s: s.encode([0.0] * 8), WidthError, "got list"),
    (lambda m, s: s.decode(torch.zeros(2, 16)), ConfigError, r"Codes\.from_dense"),
    (lambda m, s: sh.load(s), ConfigError.__mro__[1], "got SAE"),
    (lambda m, s: sh.TokenBatches("gpt2", "a text"), ConfigError, "begins with a tokenizer, got str"),
    (lambda m, s: sh.TokenBatches(None, "a text"), ConfigError, "begins with a tokenizer, got NoneType"),
    # the order of arguments
    (lambda m, s: entered(sh.read(s, m)), ConfigError, "the model comes first"),
    (lambda m, s: entered(sh.read(m, torch.ones(1, 2))), ConfigError, "expected an SAE, got Tensor"),
    (lambda m, s: sh.measure(m, [torch.ones(1, 2)], s), ConfigError, "expected an SAE, got list"),
    (lambda m, s: sh.survey(m, [torch.ones(1, 2)], s), ConfigError, "expected an SAE, got list"),
    (lambda m, s: sh.rank_latents(m, torch.ones(1, 2), s), ConfigError, "expected an SAE, got Tensor"),
    (lambda m, s: sh.harvest(m, s, "0"), ConfigError, "got SAE"),
    # calls of the verbs
    (lambda m, s: sh.read(m, s, torch.ones(1, 2)), TypeError, r"with sh\.read\(model, sae\) as trace: model\(tokens\)"),
    (lambda m, s: sh.read(m, s, tokens=torch.ones(1, 2)), TypeError, "read does not call the model"),
    (lambda m, s: sh.clamp(m, s, 3, 8.0), TypeError, r"sh\.clamp\(model, sae, \{901: 8\.0\}\)"),
    (lambda m, s: sh.steer(m, s, {3: 4.0}, strength=2.0), TypeError, "steer has no keyword strength="),
    (lambda m, s: sh.ablate(m, s, features=[3]), TypeError, "did you mean latents="),
    (lambda m, s: sh.ablate(m, s), TypeError, r"missing.*latents.*sh\.ablate\("),
    (lambda m, s: sh.attach(m, s, sh.edits.zero([3])), TypeError, "edits="),
    (lambda m, s: entered(sh.attach(m, s, edits=sh.edits.zero)), ConfigError, r"write sh\.edits\.zero\("),
    (lambda m, s: entered(sh.read(m, s, at=m[0])), SiteError, "got a module, Linear"),
    (lambda m, s: sh.edits.ablate([3]), UnknownNameError, r"edits\.zero\("),
    (lambda m, s: sh.load("folder", dtype="float16"), ConfigError, r"torch\.float16"),
    (lambda m, s: sh.survey(m, s, [["a text"]]), ConfigError, r"takes no texts.*sh\.TokenBatches"),
    # latents
    (lambda m, s: sh.ablate(m, s, {3: 8.0}), LatentError, "clamp and steer take a mapping"),
    (lambda m, s: sh.ablate(m, s, torch.zeros(16, dtype=torch.bool)), LatentError, r"mask\.nonzero"),
    (lambda m, s: sh.ablate(m, s, True), LatentError, "whole numbers"),
    (lambda m, s: sh.clamp(m, s, {3: float("nan")}), LatentError, "finite number"),
    (lambda m, s: entered(sh.ablate(m, s, -1)), LatentError, "0 to 15"),
]


@pytest.mark.parametrize(("tried", "error", "said"), NAMES, ids=range(len(NAMES)))
def test_a_natural_first_try_is_answered(model, sae, tried, error, said):
    """What a user of SAELens, TransformerLens or nnsight would write first: the error says what to write here."""
    with pytest.raises(error, match=said) as caught:
        tried(model, sae)
    assert isinstance(caught.value, sh.errors.SaehooksError) or "no tensor" in said or "decode" in said
    assert not any(module._forward_hooks for module in model)


def test_weights_are_reached_by_their_usual_names(sae):
    """Those of a linear dictionary, in the layout of SAELens: what it encodes with is what they say."""
    x = torch.randn(3, 8)
    scores = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    assert torch.equal(scores.topk(5).indices.sort().values, sae.encode(x).top(5).latents.sort().values)
    codes = sae.encode(x)
    torch.testing.assert_close(sae.decode(codes), codes.dense() @ sae.W_dec + sae.b_dec)


def test_objects_that_answer_are_still_plain_objects(model, sae):
    """Copies, pickles, `hasattr` and dicts see no difference; asking for a name leaves nothing behind."""
    codes, trace = sae.encode(torch.randn(2, 8)).detach(), trace_of(model, sae)
    for one in (sae, codes, sae.cfg):
        assert repr(copy.deepcopy(one)) == repr(one) == repr(pickle.loads(pickle.dumps(one)))
        assert not hasattr(one, "nothing_of_the_kind")
    assert repr(copy.copy(trace)) == repr(trace)
    assert {codes: 1}[codes] == 1
    assert codes == codes
    assert codes != copy.copy(codes)
    with pytest.raises(TypeError, match="not iterable"):
        list(trace)


def test_sites_are_found_by_name(model):
    """A table of sites is asked by any name of a place."""
    table = sh.sites(model)
    assert "0" in table
    assert "nowhere" not in table
    assert table["0"].width == 8
    with pytest.raises(SiteError, match="no site 'nowhere'"):
        table["nowhere"]


def test_a_ranking_says_how_it_is_read():
    """It is asked for latents or for rows, not indexed."""
    vocabulary = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 10))
    sae = sh.SAE(d_in=8, d_sae=16, dictionary="linear", activation="topk", k=3, hook_name="0")
    ranking = sh.rank_latents(vocabulary, sae, torch.randint(0, 10, (2, 5)))
    with pytest.raises(ConfigError, match=r"\.top\(n\)"):
        ranking[0]
    with pytest.raises(TypeError, match="not iterable"):
        list(ranking)
