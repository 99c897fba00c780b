"""Rankings, curves, graphs and traces show what latents stand for, by an index."""

from __future__ import annotations

import pytest
import torch

import saehooks as sh
from saehooks.errors import ConfigError

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


def test_an_index_of_another_site_shows_no_words(model, sae, batches, nasty_index):
    """Words of latents of another site would be wrong, so none are shown."""
    other = sh.SAE(d_in=32, d_sae=96, dictionary="linear", activation="topk", k=6)
    ranking = sh.rank_latents(model, other, batches[:1], at="model.layers.2", index=nasty_index)
    assert all(row["stands for"] == "" for row in ranking._shown())


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


def test_an_index_of_another_sae_is_refused(model, sae, batches, nasty_index):
    """At the same site the words of another SAE's latents would be wrong: an error before anything runs."""
    torch.manual_seed(9)
    other = sh.SAE(d_in=32, d_sae=96, activation="topk", dictionary="linear", k=6, hook_name=SITE)
    with sh.read(model, other) as trace:
        model(batches[0])
    calls = {
        "rank": lambda: sh.rank_latents(model, other, batches[:1], index=nasty_index),
        "curve": lambda: sh.causal.curve(model, other, batches[:1], [1, 2], counts=(1,), index=nasty_index),
        "graph": lambda: sh.causal.latent_graph(
            model, {SITE: other, "model.layers.2": other}, batches[:1], index={SITE: nasty_index}
        ),
        "trace": lambda: trace.top(2, index=nasty_index),
        "top": lambda: nasty_index.top(trace),
    }
    for call in calls.values():
        with pytest.raises(ConfigError, match="this index is of another SAE"):
            call()
    with pytest.raises(ConfigError, match=r"takes a LatentIndex.*got str"):
        sh.rank_latents(model, sae, batches[:1], index="folder")


def test_a_graph_knows_its_sites_by_any_name(model, sae, batches, nasty_index):
    """Sites are named as the model names them, so that an index finds its words."""
    late = sh.SAE(d_in=32, d_sae=24, dictionary="linear", activation="topk", k=4)
    graph = sh.causal.latent_graph(
        model, {SITE: sae, "model.layers.2": late}, batches[:1], n_sources=2, n_targets=2, index=nasty_index
    )
    assert graph.sites == (SITE, "model.layers.2")
    assert graph._shown()[0]["source stands for"]
