"""Ranking latents by effect, sets of them, edges between two sites."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import saehooks as sh
from saehooks import causal
from saehooks.causal.ranking import spearman
from saehooks.errors import ConfigError, LatentError, NeverFiredError, NotFiniteError, SiteError
from saehooks.where import everywhere

SITE = "blocks.1.hook_resid_post"


class TwoLayers(nn.Module):
    """Embedding, a first layer, an output layer: tokens (batch, pos) to (batch, pos, 3). All of it linear."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.second = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.runs = 0

    def forward(self, tokens):
        self.runs += 1
        return self.second(self.first(self.embed(tokens)))


@pytest.fixture
def linear_model():
    return TwoLayers().eval()


def small_sae(d_in, d_sae=24, seed=0, **settings):
    torch.manual_seed(seed)
    sae = sh.SAE(d_in=d_in, d_sae=d_sae, **settings)
    sae.cfg.metadata |= {"hook_name": SITE, "training": {"positions": "all but the first"}}
    return sae.eval()


@pytest.fixture
def tokens():
    return torch.randint(3, 64, (6, 7), generator=torch.Generator().manual_seed(1))


def last_logit(logits):
    return logits[:, -1, 5]


def by_hand(model, sae, tokens, latent, metric, at=SITE, where=slice(1, None)):
    """(batch,) change of a metric when one latent is ablated, by the verb."""
    with torch.no_grad():
        clean = metric(model(tokens))
        with sh.ablate(model, sae, [latent], at=at, where=where):
            return metric(model(tokens)) - clean


# ------------------------------------------------------------------------ ranking


def test_attribution_is_exact_where_everything_after_the_site_is_linear(linear_model):
    """With a linear metric of a linear model, activation times gradient is the exact effect."""
    sae = small_sae(4, 8, dictionary="linear", activation="topk", k=3)
    tokens = torch.randint(0, 6, (5, 3), generator=torch.Generator().manual_seed(0))
    metric = lambda logits: logits[:, :, 1].sum(-1)  # noqa: E731
    found = causal.rank_latents(linear_model, sae, tokens, metric, at="first", exact=8)
    assert torch.allclose(found.attribution, found.exact, atol=1e-5)
    assert found.agreement.spearman == pytest.approx(1.0)
    for latent in found.top(3):
        expected = by_hand(linear_model, sae, tokens, latent, metric, at="first").mean()
        assert found.of(latent)["exact"] == pytest.approx(float(expected), abs=1e-5)


def test_exact_ablation_is_what_the_verb_does(tiny_bridge, tokens):
    """Many ablations in one forward give what ``sh.ablate`` gives one by one."""
    sae = small_sae(32)
    found = causal.rank_latents(tiny_bridge, sae, tokens, last_logit, exact=24)
    assert len(found) > 5
    assert found.cost["resumed_at_site"] == 1
    for row in found.rows():
        expected = by_hand(tiny_bridge, sae, tokens, row["latent"], last_logit).mean()
        assert row["exact"] == pytest.approx(float(expected), abs=1e-5)


def test_a_plain_hugging_face_model(tiny_hf, tokens):
    """Module paths work like hook points, and earlier layers are skipped there too."""
    sae = small_sae(32)
    metric = lambda logits: logits[:, -1, 5]  # noqa: E731
    found = causal.rank_latents(tiny_hf, sae, tokens, metric, at="model.layers.1", exact=4)
    assert found.cost["resumed_at_site"] == 1
    latent = found.top(1)[0]
    with torch.no_grad():
        clean = tiny_hf(tokens).logits[:, -1, 5]
        with sh.ablate(tiny_hf, sae, [latent], at="model.layers.1", where=slice(1, None)):
            expected = (tiny_hf(tokens).logits[:, -1, 5] - clean).mean()
    assert found.of(latent)["exact"] == pytest.approx(float(expected), abs=1e-5)


def test_images(tiny_clip):
    """On a CLIP the metrics see embeddings and latents are ablated in every patch, CLS included."""
    sae, at = small_sae(32), "visual.blocks.1.hook_resid_post"
    torch.manual_seed(0)
    images, classes = torch.randn(5, 3, 16, 16), torch.randn(3, 16)
    metric = causal.class_logit(classes, labels=[0, 1, 2, 0, 1])
    found = causal.rank_latents(tiny_clip, sae, images, metric, at=at, exact=3)
    latent = found.top(1)[0]

    def logits(embedding):
        unit = nn.functional.normalize(embedding, dim=-1) @ nn.functional.normalize(classes, dim=-1).T
        return 100 * unit[range(5), [0, 1, 2, 0, 1]]

    with torch.no_grad():
        clean = logits(tiny_clip.encode_image(images))
        with sh.ablate(tiny_clip, sae, [latent], at=at):
            expected = (logits(tiny_clip.encode_image(images)) - clean).mean()
    assert found.of(latent)["exact"] == pytest.approx(float(expected), abs=1e-3)
    far = causal.rank_latents(tiny_clip, sae, images, "cosine", at=at, exact=3)
    assert float(far.exact[0]) < 0


def test_earlier_layers_run_once_for_each_batch(tiny_bridge, tokens):
    """Exact ablation enters the first block for the clean run and one trial, and the last block for every batch."""
    entered = {0: 0, 2: 0}
    for layer in entered:
        mlp = tiny_bridge.blocks[layer].mlp.original_component
        mlp.register_forward_pre_hook(lambda *_, layer=layer: entered.update({layer: entered[layer] + 1}))
    sets = {str(i): [i] for i in range(12)}
    causal.ablate_sets(tiny_bridge, small_sae(32), tokens, last_logit, ablate=sets, batch_size=6)
    assert entered[0] == 2
    assert entered[2] > 4


def test_skipping_layers_changes_nothing(tiny_bridge, tokens):
    """With and without running the earlier layers again, effects are the same."""
    from saehooks.causal.ablation import Ablator
    from saehooks.causal.metric import as_metric
    from saehooks.causal.runs import Place, as_data, runner
    from saehooks.show.progress import Bar

    place = Place(tiny_bridge, small_sae(32), SITE, None, slice(1, None))
    table = torch.eye(24, dtype=torch.bool)
    data = as_data(place.host, tokens, 4)
    both = []
    for resume in (True, False):
        measure = Ablator(place, as_metric("ce"), runner(place.host), resume=resume)
        both.append(measure(data, table, Bar()).values)
        assert measure.resume is resume
    assert torch.allclose(*both, atol=1e-5)


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1)


class PositionFirst(TwoLayers):
    """What one module before the site returns has the position as its first axis."""

    def __init__(self):
        super().__init__()
        self.flip = Transpose()

    def forward(self, tokens):
        inner = self.embed(tokens)
        side = self.flip(inner)
        return self.second(self.first(inner) + side.transpose(0, 1))


class Sorted(TwoLayers):
    """One module beside the site sees the tokens of the whole batch in one list, sorted by token."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, tokens):
        order = tokens.flatten().argsort(stable=True)
        inner = self.embed(tokens)
        mixed = self.mix(inner.flatten(0, 1)[order])
        mixed = torch.empty_like(mixed).index_copy(0, order, mixed)
        return self.second(self.first(inner) + mixed.unflatten(0, tokens.shape))


@pytest.mark.parametrize(("kind", "resumed"), [(PositionFirst, 1), (Sorted, 0)])
def test_a_model_bound_to_its_batch_runs_whole(kind, resumed):
    """Where the rows of remembered outputs cannot be told apart, the whole model runs; the effects are right."""
    torch.manual_seed(0)
    model, metric = kind().eval(), lambda logits: logits[:, -1, 0]
    sae = small_sae(4, 8, dictionary="linear", activation="topk", k=2)
    tokens = torch.randint(0, 6, (5, 3), generator=torch.Generator().manual_seed(0))
    found = causal.rank_latents(model, sae, tokens, metric, at="first", exact=2)
    assert found.cost["resumed_at_site"] == resumed
    latent = found.top(1)[0]
    expected = by_hand(model, sae, tokens, latent, metric, at="first").mean()
    assert found.of(latent)["exact"] == pytest.approx(float(expected), abs=1e-5)


def test_integrated_gradients_add_up(tiny_bridge, tokens):
    """Over a fine path the attributions of all latents sum to what ablating all of them does."""
    sae = small_sae(32)
    found = causal.rank_latents(tiny_bridge, sae, tokens, last_logit, steps=64)
    together = causal.ablate_sets(tiny_bridge, sae, tokens, last_logit, ablate={"all": range(24)})
    change = together.of("all") - found.clean
    assert float(found.attribution.sum()) == pytest.approx(change, rel=2e-3, abs=1e-4)


def test_a_divergence_takes_integrated_gradients_by_itself(tiny_bridge, tokens):
    """KL has no gradient at the clean run, so a path is taken; every exact effect is a divergence, above 0."""
    found = causal.rank_latents(tiny_bridge, small_sae(32), tokens, "kl", exact=5)
    assert found.method == "integrated gradients, 8 points"
    assert found.clean == pytest.approx(0, abs=1e-6)
    assert bool((found.exact[:5] > 0).all())
    assert bool((found.attribution[:5] != 0).all())


def test_one_forward_and_one_backward_for_all_latents(linear_model):
    """Attribution calls the model once for each batch, however many latents there are."""
    sae = small_sae(4, 64, dictionary="linear", activation="topk", k=8)
    tokens = torch.randint(0, 6, (8, 3))
    causal.rank_latents(linear_model, sae, tokens, last_of_three, at="first", batch_size=4)
    assert linear_model.runs == 2


def last_of_three(logits):
    return logits[:, -1, 2]


def test_order_of_the_ranking(linear_model):
    """Exactly measured latents come first; the sign that is asked for leads."""
    sae = small_sae(4, 8, dictionary="linear", activation="topk", k=3)
    tokens = torch.randint(0, 6, (5, 3), generator=torch.Generator().manual_seed(0))
    for order, key in (("absolute", abs), ("lowering", lambda x: -x), ("raising", lambda x: x)):
        found = causal.rank_latents(linear_model, sae, tokens, last_of_three, at="first", exact=3, order=order)
        effects = [key(row["exact"]) for row in found.rows(3)]
        assert effects == sorted(effects, reverse=True)
        rest = [key(row["attribution"]) for row in found.rows()[3:]]
        assert rest == sorted(rest, reverse=True)
        assert all(row["exact"] is None for row in found.rows()[3:])


def test_position_0_is_left_out_by_default(tiny_bridge, tokens):
    """An attention sink is not ablated unless ``everywhere`` asks for it."""
    sae = small_sae(32)
    default, all_of_them = (
        causal.rank_latents(tiny_bridge, sae, tokens, last_logit, **options) for options in ({}, {"where": everywhere})
    )
    assert int(default.tokens.sum()) < int(all_of_them.tokens.sum())


def test_prompts_of_different_lengths(tiny_hf_bridge):
    """Texts are tokenized after a BOS, run in groups of one length, and keep their answers."""
    sae = small_sae(32)
    texts = ["w1 w2 w3", "w4 w5", "w6 w7 w8", "w9 w10"]
    metric = causal.logit_difference([5, 6, 7, 8], [9, 9, 9, 9])
    found = causal.ablate_sets(tiny_hf_bridge, sae, texts, metric, ablate={"one": [3]})
    words = [[0, 4, 5, 6], [0, 7, 8], [0, 9, 10, 11], [0, 12, 13]]
    for row, answer in enumerate([5, 6, 7, 8]):
        with torch.no_grad():
            logits = tiny_hf_bridge(torch.tensor([words[row]]))[0, -1]
        assert float(found.clean[row]) == pytest.approx(float(logits[answer] - logits[9]), abs=1e-5)


def test_nothing_is_left_behind(tiny_bridge, tokens, hooks_of):
    """Hooks, methods and gradient flags are as before, also when the metric fails."""
    tiny_bridge(tokens)
    before = hooks_of(tiny_bridge), [p.requires_grad for p in tiny_bridge.parameters()]
    sae = small_sae(32)
    causal.rank_latents(tiny_bridge, sae, tokens, "ce", exact=4)
    with pytest.raises(ConfigError):
        causal.rank_latents(tiny_bridge, sae, tokens, lambda logits: logits)
    assert (hooks_of(tiny_bridge), [p.requires_grad for p in tiny_bridge.parameters()]) == before
    assert all(p.grad is None for p in [*tiny_bridge.parameters(), *sae.parameters()])


# ---------------------------------------------------------------------- bad input


def test_metrics_that_cannot_be_used(tiny_bridge, tokens):
    """Wrong shapes, NaN, no gradient, unknown names and too few answers are told apart."""
    sae = small_sae(32)

    def rank(metric, **options):
        return causal.rank_latents(tiny_bridge, sae, tokens, metric, **options)

    with pytest.raises(ConfigError, match=r"leave out the .mean\(\)"):
        rank(lambda logits: logits.mean())
    with pytest.raises(ConfigError, match=r"returned shape \(6, 7\)"):
        rank(lambda logits: logits[..., 0])
    with pytest.raises(NotFiniteError, match="6 sequences"):
        rank(lambda logits: logits[:, -1, 0] * torch.nan)
    with pytest.raises(ConfigError, match="no gradient"):
        rank(lambda logits: logits.detach()[:, -1, 0])
    with pytest.raises(ConfigError, match="does not depend"):
        rank(lambda logits: torch.ones(len(logits), requires_grad=True) * 2)
    with pytest.raises(ConfigError, match="'kl'"):
        rank("loss")
    with pytest.raises(ConfigError, match="got 2 for 6 sequences"):
        rank(causal.logit_difference([1, 2], [3, 4]))
    with pytest.raises(ConfigError, match="order="):
        rank("ce", order="down")


def test_data_that_cannot_be_used(tiny_bridge, tokens):
    """Empty data, wrong tensors, texts without a tokenizer, latents out of range and unknown sites are named."""
    sae = small_sae(32)
    with pytest.raises(ConfigError, match="no sequence"):
        causal.rank_latents(tiny_bridge, sae, tokens[:0])
    with pytest.raises(ConfigError, match="no sequence"):
        causal.rank_latents(tiny_bridge, sae, [])
    with pytest.raises(ConfigError, match="tokens"):
        causal.rank_latents(tiny_bridge, sae, tokens[0])
    with pytest.raises(LatentError, match="latent 24"):
        causal.rank_latents(tiny_bridge, sae, tokens, exact=[24])
    with pytest.raises(LatentError, match="latent 99"):
        causal.ablate_sets(tiny_bridge, sae, tokens, ablate={"a": [99]})
    with pytest.raises(ConfigError, match="sets of latents"):
        causal.ablate_sets(tiny_bridge, sae, tokens)
    sae.cfg.metadata.clear()
    with pytest.raises(SiteError, match="at="):
        causal.rank_latents(tiny_bridge, sae, tokens)


def test_latents_that_never_fire(tiny_bridge, tokens):
    """A silent latent that is asked for is named and has effect 0; data in which nothing fires is an error."""
    sae = small_sae(32, 256, dictionary="linear", activation="topk", k=2)
    active = causal.rank_latents(tiny_bridge, sae, tokens)
    silent = next(i for i in range(256) if i not in set(active.latents.tolist()))
    with pytest.warns(UserWarning, match=f"never fire in this data, so their effect is 0: {silent}"):
        found = causal.rank_latents(tiny_bridge, sae, tokens, latents=[active.top(1)[0], silent], exact=2)
    assert found.of(silent)["exact"] == 0
    with pytest.raises(LatentError, match="never selected"):
        active.of(silent)
    with pytest.raises(NeverFiredError, match="no latent"):
        causal.rank_latents(tiny_bridge, sae, tokens, where=lambda tokens, codes: torch.zeros(7, dtype=torch.bool))


def test_an_interrupt_keeps_what_was_done(tiny_bridge, tokens):
    """Ctrl-C ends a ranking early and returns it, marked as partial; with nothing done it goes through."""
    sae, calls = small_sae(32), []

    def metric(logits, stop_at):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return logits[:, -1, 5]

    def rank(stop_at, **options):
        calls.clear()
        return causal.rank_latents(
            tiny_bridge, sae, tokens, lambda logits: metric(logits, stop_at), batch_size=2, **options
        )

    half = rank(2)
    assert not half.complete
    assert half.n_sequences == 2
    assert "interrupted" in repr(half)
    in_ablation = rank(5, exact=4)
    assert not in_ablation.complete
    assert in_ablation.n_sequences == 6
    assert bool(in_ablation.exact.isnan().all())
    with pytest.raises(KeyboardInterrupt):
        rank(1)


# -------------------------------------------------------------------- sets, curves


def test_sets_are_what_the_edits_do(tiny_bridge, tokens):
    """Ablated and kept sets, with the error kept or dropped, equal the same edits in a block."""
    sae = small_sae(32)
    for error in ("keep", "drop"):
        found = causal.ablate_sets(
            tiny_bridge, sae, tokens, last_logit, ablate={"a": [1, 2, 3]}, keep={"k": [4, 5, 6]}, error=error
        )
        for name, edit in (("a", sh.edits.zero([1, 2, 3])), ("k", sh.edits.keep([4, 5, 6]))):
            with (
                torch.no_grad(),
                sh.attach(tiny_bridge, sae, at=SITE, edits=edit, error=error, where=slice(1, None)),
            ):
                expected = last_logit(tiny_bridge(tokens))
            place = found.names.index(name)
            assert torch.allclose(found.values[place].float(), expected, atol=1e-5)
    assert [row["ablated"] for row in found.rows()] == [0, 3, 21]


def test_curve_ends_meet(tiny_bridge, tokens):
    """Ablating every active latent is keeping none; keeping every active one changes nothing."""
    sae = small_sae(32)
    ranking = causal.rank_latents(tiny_bridge, sae, tokens, last_logit)
    found = causal.curve(tiny_bridge, sae, tokens, ranking, last_logit, counts=(1, len(ranking)), draws=2)
    assert found.ablated[1] == pytest.approx(found.none_kept, abs=1e-5)
    assert found.kept[1] == pytest.approx(found.clean, abs=1e-5)
    assert found.ablated_random[1] == pytest.approx(found.none_kept, abs=1e-5)
    assert found.rows()[0]["n"] == 1
    with pytest.raises(ConfigError, match="counts"):
        causal.curve(tiny_bridge, sae, tokens, [1, 2], counts=(5,))


# --------------------------------------------------------------------------- graph


def test_edges_by_hand(linear_model):
    """Between two sites of a linear model, an edge is value times weight times value, as computed without autograd."""
    torch.manual_seed(0)
    early = small_sae(4, 6, dictionary="linear", activation="relu")
    late = small_sae(4, 6, seed=1, dictionary="linear", activation="relu")
    tokens = torch.randint(0, 6, (4, 3), generator=torch.Generator().manual_seed(0))
    metric = lambda logits: logits[:, :, 1].sum(-1)  # noqa: E731
    saes = {"embed": early, "first": late}
    found = causal.latent_graph(linear_model, saes, tokens, metric, where=everywhere, n_sources=6, n_targets=6)
    with torch.no_grad():
        x = linear_model.embed(tokens)
        y = linear_model.first(x)
        a, b = early.encode(x).dense(), late.encode(y).dense()
        w_late, w_early = late.directions(list(range(6))), early.directions(list(range(6)))
        g = w_late @ linear_model.second.weight[1]  # gradient of the metric at each late latent
        into = linear_model.first.weight.T @ late.dictionary.W_enc  # (4, 6)
        jacobian = w_early @ into  # (6, 6), d late score / d early value
        edges = -torch.einsum("bpi,ij,bpj,j->ij", a, jacobian, (b > 0).float(), g) / len(tokens)
    for row in found.rows():
        assert row["edge"] == pytest.approx(float(edges[row["source"], row["target"]]), abs=1e-5)
    assert float(found.target_effect[0]) == pytest.approx(
        float(-(b * g).sum((0, 1))[found.targets[0]]) / len(tokens), abs=1e-5
    )


def test_graph_between_two_blocks(tiny_bridge, tokens):
    """A graph of a transformer has edges, prints and plots; sites in the wrong order are an error."""
    saes = {"blocks.0.hook_resid_post": small_sae(32), SITE: small_sae(32, seed=3)}
    graph = causal.latent_graph(tiny_bridge, saes, tokens, last_logit, n_sources=5, n_targets=3)
    assert len(graph.rows()) == 15
    assert "blocks.0.hook_resid_post -> blocks.1" in repr(graph)
    assert "<table>" in graph._repr_html_()
    assert len(graph.plot().axes) == 1
    assert len(graph.to_pandas()) == 15
    with pytest.raises(ConfigError, match="earlier site first"):
        causal.latent_graph(tiny_bridge, dict(reversed(saes.items())), tokens, last_logit)
    with pytest.raises(ConfigError, match="two SAEs"):
        causal.latent_graph(tiny_bridge, {SITE: saes[SITE]}, tokens)


# ---------------------------------------------------------------------- the tables


def test_ranking_shows_itself(tiny_bridge, tokens):
    """A ranking prints, goes to pandas and HTML, and plots."""
    found = causal.rank_latents(tiny_bridge, small_sae(32), tokens, "ce", exact=6)
    assert "Spearman" in repr(found)
    alone = repr(causal.rank_latents(tiny_bridge, small_sae(32), tokens[:1], "ce", exact=1))
    assert "in 1 sequence; 1 ablated exactly\n" in alone
    assert "<table>" in found._repr_html_()
    frame = found.to_pandas()
    assert list(frame.columns[:4]) == ["rank", "latent", "attribution", "exact"]
    assert frame["latent"].tolist() == found.latents.tolist()
    assert len(found.plot(5).axes) == len(found.plot_agreement().axes) == 1
    one = causal.curve(tiny_bridge, small_sae(32), tokens, found, "ce", counts=(1, 2), draws=1)
    assert "only top n kept" in repr(one)
    assert len(one.plot().axes) == 1
    assert len(one.to_pandas()) == 2
    plain = causal.rank_latents(tiny_bridge, small_sae(32), tokens, "ce")
    with pytest.raises(ConfigError, match="exact=64"):
        plain.agreement  # noqa: B018


def test_rank_correlation():
    """Ties share the mean of their ranks; too few values or a constant side have none."""
    assert spearman(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 2.0, 3.0])) == pytest.approx(1.0)
    assert spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])) == pytest.approx(-1.0)
    assert spearman(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([3.0, 2.0, 1.0])) != 0
    assert torch.isnan(torch.tensor(spearman(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))))


def test_answers_are_single_tokens(tiny_tokenizer):
    """A word of several tokens cannot be an answer."""
    assert causal.token_ids(tiny_tokenizer, ["w1", "w2"]).tolist() == [4, 5]
    with pytest.raises(ConfigError, match="not one token"):
        causal.token_ids(tiny_tokenizer, ["w1 w2"])
