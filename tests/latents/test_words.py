"""Rankings, curves, graphs and traces show what latents stand for, by an index."""

from __future__ import annotations

import pytest
import torch

import saehooks as sh
from saehooks.errors import ConfigError, FormatError

SITE = "model.layers.1"


def test_a_ranking_shows_words(model, sae, batches, nasty_index):
    """The words stand beside each latent in terminal, notebook and plot; the numbers stay as they are."""
    plain = sh.rank_latents(model, sae, batches[:1])
    ranking = sh.rank_latents(model, sae, batches[:1], index=nasty_index)
    assert ranking.latents.tolist() == plain.latents.tolist()
    first = ranking.top(1)[0]
    assert nasty_index.words(first, 1) in repr(ranking)
    assert "stands for" in ranking._repr_html_()
    assert "stands for" not in repr(plain)
    assert repr(plain.with_index(nasty_index)) == repr(ranking)
    labels = [text.get_text() for text in ranking.plot(3).axes[0].get_yticklabels()]
    assert labels[0].startswith(f"{first} ")
    assert next(text.get_text() for text in plain.plot(3).axes[0].get_yticklabels()) == str(first)


def test_curves_and_graphs_show_words(model, sae, batches, nasty_index):
    """A curve says what each n adds; a graph names both ends."""
    ranking = sh.rank_latents(model, sae, batches[:1], index=nasty_index)
    curve = sh.causal.curve(model, sae, batches[:1], ranking, counts=(1, 3), draws=1)
    assert nasty_index.words(ranking.top(1)[0], 1).split()[0] in repr(curve)
    torch.manual_seed(3)
    late = sh.SAE(d_in=32, d_sae=24, dictionary="linear", activation="topk", k=4)
    graph = sh.causal.latent_graph(
        model, {SITE: sae, "model.layers.2": late}, batches[:1], n_sources=3, n_targets=2, index={SITE: nasty_index}
    )
    row = graph._shown()[0]
    assert row["source stands for"] == nasty_index.words(int(row["source"]), 4)
    assert row["target stands for"] == ""
    assert graph.plot(4).axes[0].texts[0].get_text().split()[0].isdigit()


def test_a_trace_shows_words(model, sae, batches, nasty_index):
    """`trace.top(k, index=index)` is a table of tokens; without it, the two tensors."""
    with sh.read(model, sae) as trace:
        model(batches[0])
    latents, _ = trace.top(2)
    table = trace.top(2, index=nasty_index)
    rows = table.rows()
    assert len(rows) == batches[0].numel()
    first = int(latents[0, 1, 0])
    assert rows[1]["strongest"].startswith(f"{first} {nasty_index.words(first, 3)}")
    assert "strongest" in repr(table)
    assert "<table" in table._repr_html_()


LATE = "model.layers.2"


@pytest.fixture(scope="module")
def strange(model, sae, batches, tmp_path_factory):
    """Indices that are not of ``sae`` at ``SITE``, by what is wrong with them; some were saved and loaded."""

    def made(seed, d_sae=96, at=SITE):
        torch.manual_seed(seed)
        return sh.SAE(d_in=32, d_sae=d_sae, activation="topk", dictionary="linear", k=6, hook_name=at)

    def interrupted(batches):
        yield from batches[:2]
        raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("indices")
    trained = made(0)
    with torch.no_grad():
        trained.dictionary.W_dec[:, 5] += 0.01
    found = {
        "other weights": sh.survey(model, made(9), batches),
        "more training": sh.survey(model, trained, batches),
        "other d_sae": sh.survey(model, made(0, d_sae=64), batches),
        "other site": sh.survey(model, sae, batches, at=LATE),
        "not finished, other weights": sh.survey(model, made(9), interrupted(batches)),
    }
    for name in ("other weights", "other site", "other d_sae"):
        found[name].save(folder / name)
        found[f"{name}, loaded"] = sh.LatentIndex.load(folder / name)
    return found


def everything_that_takes_an_index(model, sae, batches):
    """Each verb, with an index to be given."""
    data = batches[:1]
    late = sh.SAE(d_in=32, d_sae=24, dictionary="linear", activation="topk", k=4)
    with sh.read(model, sae) as trace:
        model(batches[0])
    ranking = sh.rank_latents(model, sae, data)
    curve = sh.causal.curve(model, sae, data, ranking, counts=(1,), draws=1)
    graph = sh.causal.latent_graph(model, {SITE: sae, "lm_head": sh.SAE(d_in=64, d_sae=8)}, data)
    return {
        "rank_latents": lambda index: sh.rank_latents(model, sae, data, index=index),
        "rank_latents, by site": lambda index: sh.rank_latents(model, sae, data, index={SITE: index}),
        "Ranking.with_index": ranking.with_index,
        "Ranking.plot": lambda index: ranking.plot(3, index=index),
        "curve": lambda index: sh.causal.curve(model, sae, data, [1, 2], counts=(1,), index=index),
        "Curve.with_index": curve.with_index,
        "latent_graph": lambda index: sh.causal.latent_graph(
            model, {SITE: sae, "lm_head": sh.SAE(d_in=64, d_sae=8)}, data, index=index
        ),
        "latent_graph, by site": lambda index: sh.causal.latent_graph(
            model, {SITE: sae, LATE: late}, data, index={SITE: index}
        ),
        "Graph.with_index": lambda index: graph.with_index({SITE: index}),
        "Graph.plot": lambda index: graph.plot(3, index=index),
        "Trace.top": lambda index: trace.top(2, index=index),
        "index.top": lambda index: index.top(trace),
        "index.page": lambda index: index.page("never_written.html", effects=ranking),
    }


def test_an_index_of_other_latents_is_refused(model, sae, batches, nasty_index, strange, tmp_path, monkeypatch):
    """Its words would be wrong: every verb that takes one says so, whatever is wrong; the right one is taken."""
    monkeypatch.chdir(tmp_path)
    calls = everything_that_takes_an_index(model, sae, batches)
    for name, index in strange.items():
        said = "this index is of the latents at" if "site" in name else "this index is of another SAE"
        for verb, call in calls.items():
            with pytest.raises(ConfigError) as caught:
                call(index)
            assert said in str(caught.value), (verb, name)
    assert not list(tmp_path.iterdir())
    nasty_index.save(tmp_path / "index")
    loaded = sh.LatentIndex.load(tmp_path / "index")
    for call in calls.values():
        call(nasty_index)
        call(loaded)


def test_a_saved_sae_keeps_its_index(model, sae, batches, nasty_index, tmp_path):
    """The SAE loaded from its folder is the one surveyed; in another precision it says what may be the matter."""
    sae.save(tmp_path / "sae")
    again = sh.load(tmp_path / "sae")
    assert "stands for" in repr(sh.rank_latents(model, again, batches[:1], index=nasty_index))
    assert again.frozen().fingerprint() == sae.fingerprint()
    with pytest.raises(ConfigError, match="another precision"):
        sh.rank_latents(model, again.to(torch.bfloat16), batches[:1], index=nasty_index)


def test_no_index_is_said(model, sae, batches, nasty_index, tmp_path):
    """A folder instead of what is in it, an SAE, one latent, a site that is not there, an interrupted survey."""
    for given, said in (
        ("folder", r"got str; write sh\.LatentIndex\.load\('folder'\)"),
        (tmp_path, r"sh\.LatentIndex\.load"),
        (sae, "got SAE"),
        (nasty_index[3], "got Latent"),
        ({"model.layers.9": nasty_index}, r"index for 'model\.layers\.9'; the latents are at 'model\.layers\.1'"),
    ):
        with pytest.raises(ConfigError, match=said):
            sh.rank_latents(model, sae, batches[:1], index=given)
    with pytest.raises(ConfigError, match="expected the SAE that was surveyed, got LlamaForCausalLM"):
        nasty_index.bind(sae, model)


def test_an_interrupted_survey_is_said_in_captions(model, sae, batches, tmp_path):
    """Its words are right, and from part of the data; a folder with a checkpoint alone says how to go on."""

    def interrupted():
        yield from batches[:2]
        raise KeyboardInterrupt

    index = sh.survey(model, sae, interrupted(), folder=tmp_path)
    said = "words from an interrupted survey of 6 sequences"
    with sh.read(model, sae) as trace:
        model(batches[0])
    ranking = sh.rank_latents(model, sae, batches[:1], index=index)
    assert said in repr(ranking)
    assert said in repr(trace.top(2, index=index))
    assert said in repr(sh.causal.curve(model, sae, batches[:1], ranking, counts=(1,), draws=1))
    (tmp_path / "index.safetensors").unlink()
    with pytest.raises(FormatError, match=r"interrupted; sh\.survey\(.*resume=True\)"):
        sh.LatentIndex.load(tmp_path)


def test_a_ranking_of_other_latents_makes_no_curve(model, sae, batches):
    """The best latents of another SAE, or of another site, are numbers without a meaning here."""
    torch.manual_seed(9)
    other = sh.SAE(d_in=32, d_sae=96, activation="topk", dictionary="linear", k=6, hook_name=SITE)
    ranking = sh.rank_latents(model, other, batches[:1])
    with pytest.raises(ConfigError, match="another SAE's latents"):
        sh.causal.curve(model, sae, batches[:1], ranking, counts=(1,))
    with pytest.raises(ConfigError, match=r"at 'model\.layers\.1', and the SAE is attached at 'model\.layers\.2'"):
        sh.causal.curve(model, other, batches[:1], ranking, counts=(1,), at=LATE)


def test_a_graph_knows_its_sites_by_any_name(model, sae, batches, nasty_index):
    """Sites are named as the model names them, so that an index finds its words."""
    late = sh.SAE(d_in=32, d_sae=24, dictionary="linear", activation="topk", k=4)
    graph = sh.causal.latent_graph(
        model, {SITE: sae, "model.layers.2": late}, batches[:1], n_sources=2, n_targets=2, index=nasty_index
    )
    assert graph.sites == (SITE, "model.layers.2")
    assert graph._shown()[0]["source stands for"]
