"""`sh.survey` against a dense computation that knows nothing of streaming, and what its index answers."""

from __future__ import annotations

import pytest
import torch

import saehooks as sh
from saehooks.errors import ConfigError, FormatError, LatentError
from saehooks.latents import LatentIndex
from saehooks.latents.cofiring import CoFiring, nearest
from saehooks.latents.shelf import Shelf, best_of_each, lottery
from saehooks.latents.tallies import Tallies
from saehooks.sae import Transcoder

SITE = "model.layers.1"


@torch.no_grad()
def dense_of(model, sae, batches) -> torch.Tensor:
    """(sequences, pos, d_sae) values, NaN where a latent was not selected or a position is first: by a plain hook."""
    found = []
    block = model.get_submodule(SITE)
    handle = block.register_forward_hook(
        lambda *call: found.append(call[2][0] if isinstance(call[2], tuple) else call[2])
    )
    for batch in batches:
        model(batch)
    handle.remove()
    acts = torch.cat(found)
    # TopK, written out: the k largest of relu((x - b_dec) @ W_enc + b_enc)
    parameters = dict(sae.dictionary.named_parameters())
    scores = (acts - parameters["b_dec"]) @ parameters["W_enc"] + parameters["b_enc"]
    best = scores.topk(6, dim=-1)
    dense = torch.full_like(scores, float("nan")).scatter(-1, best.indices, best.values.relu())
    dense[:, 0] = float("nan")
    return dense


@pytest.fixture(scope="module")
def surveyed(model, sae, batches, tiny_tokenizer):
    index = sh.survey(model, sae, batches, where=slice(1, None), tokenizer=tiny_tokenizer)
    return index, dense_of(model, sae, batches)


def test_counts_and_values_are_those_of_a_dense_computation(surveyed, batches):
    """Density, mean, extremes, quantiles and dead latents, each computed from all values at once."""
    index, dense = surveyed
    flat = dense.reshape(-1, 96)
    assert index.positions == 4 * 3 * 19
    assert index.sequences == 12
    assert torch.equal(index.counts, (~flat.isnan()).sum(0))
    assert index.dead.tolist() == (index.counts == 0).nonzero()[:, 0].tolist()
    assert torch.allclose(index.density, index.counts.double() / (12 * 19))
    for latent in index.counts.nonzero()[:, 0].tolist():
        values = flat[:, latent][~flat[:, latent].isnan()].double()
        assert index[latent].mean == pytest.approx(float(values.mean()), rel=1e-5, abs=1e-6)
        assert index.quantile(latent, 1.0) == pytest.approx(float(values.max()), rel=1e-5, abs=1e-6)
        assert index.quantile(latent, 0.0) == pytest.approx(float(values.min()), rel=1e-5, abs=1e-6)
        for q in (0.25, 0.5, 0.95):
            exact = float(values.quantile(q))
            assert index.quantile(latent, q) == pytest.approx(exact, rel=0.023, abs=1e-6)
        assert index.typical(latent) == index.quantile(latent, 0.5)


def test_the_strongest_places_are_the_strongest(surveyed, batches):
    """The best place of each sequence, best sequences first, with the tokens around it and the values there."""
    index, dense = surveyed
    tokens = torch.cat(batches)
    for latent in index.counts.nonzero()[:, 0].tolist()[:40]:
        column = dense[:, :, latent].nan_to_num(nan=-1.0)
        best = column.amax(1)
        order = [i for i in best.argsort(descending=True).tolist() if best[i] >= 0]
        contexts = index[latent].contexts
        assert len(contexts) == len(order)
        for context, sequence in zip(contexts, order, strict=True):
            assert context.value == pytest.approx(float(best[sequence]), rel=1e-5, abs=1e-6)
            row, place = context.sequence, context.column
            assert float(column[row, place]) == pytest.approx(context.value, rel=1e-5, abs=1e-6)
            low, high = max(0, place - 16), min(20, place + 9)
            assert context.tokens == tokens[row, low:high].tolist()
            assert context.tokens[context.peak] == int(tokens[row, place])
            expected = dense[row, low:high, latent].nan_to_num(nan=0.0)
            shown = torch.tensor(context.values)
            assert shown.isnan().tolist() == [i == 0 for i in range(low, high)]
            assert torch.allclose(shown.nan_to_num(nan=0.0), expected, rtol=1e-4, atol=1e-6)


def test_sampled_places_fire(surveyed):
    """Each place drawn is one where the latent was selected, with its value; no sequence comes twice."""
    index, dense = surveyed
    for latent in index.counts.nonzero()[:, 0].tolist():
        drawn = index[latent].sampled
        assert len({context.sequence for context in drawn}) == len(drawn)
        for context in drawn:
            value = float(dense[context.sequence, context.column, latent])
            assert context.value == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_what_is_not_wanted_is_left_out(surveyed, model, sae, batches, tmp_path):
    """No places drawn at random, no tokens, no neighbours: the rest is as before, and it is shown and written."""
    full, _ = surveyed
    index = sh.survey(model, sae, batches, where=slice(1, None), sampled=0, logits=0, neighbours=0)
    assert torch.equal(index.counts, full.counts)
    latent = int(index.counts.argmax())
    assert [one.value for one in index[latent].contexts] == [one.value for one in full[latent].contexts]
    assert index[latent].sampled == []
    assert "drawn at random" not in index[latent]._repr_html_()
    assert index.page(tmp_path / "page.html").stat().st_size > 0
    index.save(tmp_path / "index")
    assert LatentIndex.load(tmp_path / "index")[latent].sampled == []


def test_neighbours_are_the_cosines(surveyed, sae):
    """Firing together and pointing alike, each by its formula on dense tables."""
    index, dense = surveyed
    fires = (~dense.reshape(-1, 96).isnan()).double()
    together = fires.T @ fires
    norms = fires.sum(0).sqrt()
    cosine = (together / (norms[:, None] * norms)).nan_to_num().fill_diagonal_(-1)
    directions = torch.nn.functional.normalize(sae.directions(list(range(96))).detach(), dim=1)
    alike = (directions @ directions.T).fill_diagonal_(-1)
    for kept, expected in ((index.fired_with, cosine), (index.alike, alike)):
        best = expected.topk(10, dim=1).values.clamp(min=0).float()
        assert torch.allclose(kept.similarity, best, atol=1e-5)
        shown = kept.latents >= 0
        named = expected.gather(1, kept.latents.clamp(min=0)).float()
        assert torch.allclose(named[shown], kept.similarity[shown], atol=1e-5)


def test_logits_are_those_of_the_unembedding(surveyed, model, sae):
    """Tokens raised and lowered: the direction through the final norm's gain and the unembedding, less the mean."""
    index, _ = surveyed
    change = (sae.directions(5) * model.model.norm.weight) @ model.lm_head.weight.T
    change = (change - change.mean()).detach()[0]
    best, worst = change.topk(10), (-change).topk(10)
    assert index.raises.latents[5].tolist() == best.indices.tolist()
    assert torch.allclose(index.raises.similarity[5], best.values, atol=1e-5)
    assert torch.allclose(index.lowers.similarity[5], -worst.values, atol=1e-5)
    assert [piece for piece, _ in index[5].raises] == [index.piece(token) for token in best.indices.tolist()]


def test_order_and_cut_of_the_batches_do_not_matter(model, sae, batches, surveyed):
    """The same sequences in one batch give the same counts, quantiles and strongest places."""
    once = sh.survey(model, sae, [torch.cat(batches)], where=slice(1, None))
    index, _ = surveyed
    assert torch.equal(once.counts, index.counts)
    assert torch.allclose(once.quantiles, index.quantiles, rtol=1e-5, equal_nan=True)
    assert torch.allclose(once.best["values"], index.best["values"], rtol=1e-4, atol=1e-6, equal_nan=True)
    assert torch.equal(once.drawn["sequences"], index.drawn["sequences"])
    assert torch.equal(once.drawn["columns"], index.drawn["columns"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_text(model, sae, side):
    """A padded batch gives the index that its texts give one by one: counts, values, and contexts without padding."""
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(3, 64, (n,), generator=generator) for n in (5, 12, 8)]
    alone = sh.survey(model, sae, [text[None] for text in texts], where=slice(1, None))
    tokens, mask = torch.full((3, 12), 2), torch.zeros(3, 12, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(12 - len(text), 12) if side == "left" else slice(0, len(text))
        tokens[row, place], mask[row, place] = text, 1
    padded = sh.survey(model, sae, [{"input_ids": tokens, "attention_mask": mask}], where=slice(1, None))
    assert padded.positions == alone.positions == 4 + 11 + 7
    assert torch.equal(padded.counts, alone.counts)
    assert torch.allclose(padded.mean, alone.mean, rtol=1e-4, atol=1e-5, equal_nan=True)
    for latent in alone.counts.nonzero()[:, 0].tolist():
        for one, other in zip(padded.contexts(latent), alone.contexts(latent), strict=True):
            assert one.sequence == other.sequence
            assert one.tokens == other.tokens
            assert one.peak == other.peak
            assert one.value == pytest.approx(other.value, rel=1e-4, abs=1e-5)


def test_an_index_is_saved_whole(surveyed, tmp_path, model, sae):
    """What is read back shows the same; a loaded index reads a text once it knows its model."""
    index, _ = surveyed
    index.name(5, "music & <b>")
    index.save(tmp_path / "index")
    again = LatentIndex.load(tmp_path / "index")
    assert repr(again[5]) == repr(index[5])
    assert again[5]._repr_html_() == index[5]._repr_html_()
    assert "music &amp; &lt;b&gt;" in again[5]._repr_html_()
    assert again.search("music").latents == [5]
    with pytest.raises(ConfigError, match="bind"):
        again.top("w5 w6")
    again.bind(model, sae, index.tokenizer)
    assert again.top("w5 w6 w7").rows() == index.top("w5 w6 w7").rows()
    with pytest.raises(ConfigError, match="another SAE"):
        again.bind(model, sh.SAE(d_in=32, d_sae=96, hook_name=SITE))
    with pytest.raises(FormatError, match="survey"):
        LatentIndex.load(tmp_path / "nowhere")


def test_an_interrupted_survey_goes_on(model, sae, batches, tmp_path, surveyed):
    """Ctrl-C keeps what was read, and says that it is partial; resuming gives what an undisturbed survey gives."""

    def interrupted():
        yield from batches[:2]
        raise KeyboardInterrupt

    folder = tmp_path / "index"
    partial = sh.survey(model, sae, interrupted(), folder=folder, where=slice(1, None))
    assert not partial.complete
    assert partial.sequences == 6
    with pytest.raises(FormatError, match="resume=True"):
        sh.survey(model, sae, batches, folder=folder, where=slice(1, None))
    with pytest.raises(ConfigError, match="first one differs"):
        sh.survey(model, sae, batches[::-1], folder=folder, resume=True, where=slice(1, None))
    other = sh.SAE(d_in=32, d_sae=96, hook_name=SITE)
    with pytest.raises(ConfigError, match="fingerprint"):
        sh.survey(model, other, batches, folder=folder, resume=True, where=slice(1, None))
    whole = sh.survey(model, sae, batches, folder=folder, resume=True, where=slice(1, None))
    index, _ = surveyed
    assert whole.complete
    assert torch.equal(whole.counts, index.counts)
    for name in ("scores", "sequences", "columns", "tokens"):
        assert torch.equal(whole.best[name], index.best[name])
        assert torch.equal(whole.drawn[name], index.drawn[name])
    assert torch.equal(whole.quantiles.nan_to_num(), index.quantiles.nan_to_num())
    assert torch.equal(whole.fired_with.latents, index.fired_with.latents)
    assert sorted(file.name for file in folder.iterdir()) == ["index.json", "index.safetensors"]
    with pytest.raises(FormatError, match="its survey is complete"):
        sh.survey(model, sae, batches, folder=folder, resume=True, where=slice(1, None))


def test_an_error_loses_nothing(model, sae, batches, tmp_path, hooks_of):
    """A batch that fails ends the survey with its own error; what was read is there to go on with."""
    before = hooks_of(model)
    folder = tmp_path / "index"
    with pytest.raises(IndexError):
        sh.survey(model, sae, [*batches[:3], torch.full((1, 4), 10**6)], folder=folder, where=slice(1, None))
    assert hooks_of(model) == before
    whole = sh.survey(model, sae, batches, folder=folder, resume=True, where=slice(1, None))
    assert whole.sequences == 12


def test_bad_input_is_named(model, sae, batches, surveyed):
    """A text instead of batches, no batches, numbers out of range, a latent out of range, a dead one."""
    with pytest.raises(ConfigError, match="one text"):
        sh.survey(model, sae, "a text")
    with pytest.raises(ConfigError, match="empty"):
        sh.survey(model, sae, [])
    with pytest.raises(ConfigError, match="contexts"):
        sh.survey(model, sae, batches, contexts=0)
    index, _ = surveyed
    for latent in (96, -1):
        with pytest.raises(LatentError, match="0 to 95"):
            index[latent]
    dead = index.dead.tolist()
    if dead:
        with pytest.raises(LatentError, match="never fired"):
            index.typical(dead[0])
        assert "never fired" in repr(index[dead[0]])
        index[dead[0]]._repr_html_()
    with pytest.raises(ConfigError, match="word to search"):
        index.search("  ")


def test_search_and_like_and_top_find_latents(surveyed, model, sae):
    """A word at a latent's strongest place finds it; the nearest direction comes first; a text's strongest leads."""
    index, _ = surveyed
    latent = int(index.counts.argmax())
    peak = index.word(index[latent].contexts[0])
    assert latent in index.search(peak.strip("·"), n=96).latents
    assert index.search("nosuchword").rows() == []
    near = index.like(latent)
    first = {near.latents[0]} & {index[latent].alike[0][0], index[latent].fires_with[0][0]}
    assert first
    tokens = torch.tensor([[0, 7, 9, 11, 30]])
    with sh.read(model, sae, where=slice(1, None)) as trace:
        model(tokens)
    values = trace.codes.dense()[0, 1:].amax(0)
    top = index.top(tokens, n=3)
    assert top.latents[0] == int(values.argmax())
    assert top.rows() == index.top(trace, n=3).rows()
    assert top.rows()[0]["value"] == pytest.approx(float(values.max()), rel=1e-5)
    assert len(index.top(tokens, n=3, by="rarity")) == 3
    for shown in (repr(index), repr(top), top._repr_html_(), index._repr_html_()):
        assert shown


def test_images_keep_their_patches(tiny_clip):
    """The strongest images of each latent, its value at every patch, and a small copy of the picture."""
    sae = sh.SAE(
        d_in=32, d_sae=48, activation="topk", dictionary="linear", k=4, hook_name="visual.blocks.1.hook_resid_post"
    )
    images = [torch.rand(3, 3, 16, 16) for _ in range(3)]
    labels = [f"kind{i}" for i in range(9)]
    index = sh.survey(tiny_clip, sae.eval(), images, labels=labels, contexts=4)
    with sh.read(tiny_clip, sae) as trace:
        tiny_clip.encode_image(torch.cat(images))
    dense = trace.codes.dense()
    inside = torch.ones(dense.shape[:2], dtype=torch.bool) if trace.mask is None else trace.mask
    latent = int(index.counts.argmax())
    column = dense[:, :, latent].masked_fill(~inside, -1.0)
    context = index[latent].contexts[0]
    assert context.sequence == int(column.max(1).values.argmax())
    assert context.value == pytest.approx(float(column.max()), rel=1e-4)
    assert context.tokens is None
    assert len(context.values) == 17
    assert index.metadata["grid"] == [1, 4, 4]
    assert torch.allclose(torch.tensor(context.values)[inside[0]], column[context.sequence][inside[0]], atol=1e-5)
    original = torch.cat(images)[context.sequence]
    mean, std = (
        (torch.tensor(x).view(3, 1, 1) for x in (tiny_clip.visual.image_mean, tiny_clip.visual.image_std))
        if getattr(tiny_clip.visual, "image_mean", None)
        else (0.0, 1.0)
    )
    expected = ((original * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    assert torch.equal(context.picture, expected)
    assert latent in index.search(labels[context.sequence], n=48).latents
    assert "<svg" in index[latent]._repr_html_()
    assert f"image {context.sequence}" in repr(index[latent])


def test_a_transcoder_is_surveyed_where_it_reads():
    """Its codes are those of the site it reads, whichever it writes; a text is read the same way."""
    model = torch.nn.Sequential(
        torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6)
    )
    sae = Transcoder(d_in=8, d_sae=32, d_out=6, dictionary="linear", activation="relu")
    tokens = torch.randint(0, 50, (4, 16))
    index = sh.survey(model, sae, [tokens], at=("1", "3"), where=sh.everywhere)
    dense = sae.encode(model[1](model[0](tokens))).dense().detach()
    assert torch.equal(index.counts, (dense > 0).sum((0, 1)))
    assert index.top(tokens[:1], n=1).latents == [int(dense[0].amax(0).argmax())]


# ------------------------------------------------------------------- the pieces


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_quantiles_follow_the_values_at_every_scale(scale):
    """Positive, negative and zero values in any order: a quantile is within a bin of the exact one."""
    values = torch.cat([torch.randn(3000) * scale, torch.zeros(200), torch.rand(800) * 50 * scale])
    values = values[torch.randperm(len(values))]
    tallies = Tallies(2)
    for part in values.split(137):
        tallies.add(torch.ones(len(part), dtype=torch.int64), part)
    found = tallies.quantiles()
    assert found[0].isnan().all()
    exact = values.double().quantile(torch.linspace(0, 1, 101).double())
    assert torch.allclose(found[1].double(), exact, rtol=0.022, atol=scale * 0.02)
    assert found[1][0] == values.min()
    assert found[1][-1] == values.max()
    assert (found[1].diff() >= 0).all()


def test_few_values_have_quantiles_too():
    """One value is every quantile; of two the median lies between them."""
    tallies = Tallies(2)
    tallies.add(torch.tensor([0, 1, 1]), torch.tensor([3.0, 1.0, 4.0]))
    found = tallies.quantiles()
    assert (found[0] == 3.0).all()
    assert float(found[1][50]) == pytest.approx(2.5, rel=0.023)


def test_a_shelf_keeps_the_best():
    """Whatever the order of the offers, the K best stay, in order, each with its own surroundings."""
    shelf = Shelf(3, 4, 2)
    latents, scores = torch.randint(0, 3, (200,)), torch.rand(200).double()
    for start in range(0, 200, 23):
        part = slice(start, start + 23)
        wanted = shelf.wants(latents[part], scores[part]).nonzero()[:, 0] + start

        def window(taken, wanted=wanted):
            return wanted[taken][:, None].int().expand(-1, 2), scores[wanted[taken]][:, None].expand(-1, 2)

        shelf.offer(latents[wanted], scores[wanted], scores[wanted], wanted, wanted, window)
    for latent in range(3):
        mine = (latents == latent).nonzero()[:, 0]
        best = mine[scores[mine].argsort(descending=True)][:4]
        assert shelf.sequences[latent].tolist() == best.tolist()
        assert shelf.tokens[latent, :, 0].tolist() == best.tolist()
        assert torch.allclose(shelf.around[latent, :, 1].double(), scores[best])


def test_a_lottery_is_fair():
    """Numbers are spread evenly, differ between places, and are the same each time."""
    n = 20_000
    numbers = lottery(torch.arange(n) % 7, torch.arange(n) // 50, torch.arange(n) % 50)
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    assert float(numbers.mean()) == pytest.approx(0.5, abs=0.01)
    assert len(numbers.unique()) == n
    histogram = torch.histc(numbers.float(), 20, 0, 1)
    assert float(((histogram - n / 20) ** 2 / (n / 20)).sum()) < 50
    assert torch.equal(numbers, lottery(torch.arange(n) % 7, torch.arange(n) // 50, torch.arange(n) % 50))
    assert best_of_each(torch.tensor([5, 5, 2]), torch.tensor([1.0, 1.0, 3.0])).tolist() == [2, 0]


def test_large_saes_estimate_who_fires_together(monkeypatch):
    """Beyond the limit the cosines of firing patterns are estimated, close enough to find the true neighbour."""
    monkeypatch.setattr("saehooks.latents.cofiring.EXACT_UP_TO", 10)
    cofiring = CoFiring(40)
    fires = torch.rand(4000, 40) < 0.02
    fires[:, 1] = fires[:, 0] & (torch.rand(4000) < 0.8)
    rows, latents = fires.nonzero(as_tuple=True)
    for start in range(0, 4000, 500):
        part = (rows >= start) & (rows < start + 500)
        cofiring.add(rows[part] - start, latents[part], 500, seed=start)
    found = cofiring.neighbours(3)
    assert int(found.latents[0, 0]) == 1
    exact = nearest(fires.T.float(), 3)
    assert float(found.similarity[0, 0]) == pytest.approx(float(exact.similarity[0, 0]), abs=0.2)


def test_crowded_batches_count_a_sample_of_positions(monkeypatch):
    """Where every position selects many latents, pairs are counted at some positions, and cosines stay near."""
    monkeypatch.setattr("saehooks.latents.cofiring.PAIRS_AT_ONCE", 4000)
    fires = torch.rand(2000, 12) < 0.5
    fires[:, 3] = fires[:, 2]
    cofiring = CoFiring(12)
    rows, latents = fires.nonzero(as_tuple=True)
    cofiring.add(rows, latents, 2000, seed=0)
    assert 0 < int(cofiring.table.sum()) <= 4000
    found = cofiring.neighbours(1)
    assert found.latents[2].tolist() == [3]
    assert float(found.similarity[2, 0]) == pytest.approx(1.0)


def test_what_is_no_latent_is_answered(nasty_index):
    """A word, a slice, a fraction, a list or a truth value: the error says what to write."""
    with pytest.raises(LatentError, match=r"index\.search\('music'\)"):
        nasty_index["music"]
    for wrong in (slice(1, 3), 1.5, [1, 2], True, None):
        with pytest.raises(LatentError, match="the number of one latent"):
            nasty_index[wrong]
    with pytest.raises(LatentError, match="latents 0 to 95"):
        nasty_index.typical(96)
    with pytest.raises(LatentError, match=r"index\.search"):
        nasty_index.words("music")
    for kind in (torch.tensor(7), torch.tensor(7).numpy()[()]):
        assert nasty_index[kind].latent == 7
        assert nasty_index.words(kind) == nasty_index.words(7)


def test_what_is_rare_was_seen(model, sae, batches):
    """By rarity a latent that never fired in the survey, of which nothing is known, stands after all others."""
    index = sh.survey(model, sae, batches[:1], where=slice(1, None))
    found = index.top(batches[1][:1], n=96, by="rarity").rows()
    dead = [row["density"] == 0 for row in found]
    assert any(dead)
    assert dead == sorted(dead)
    shares = [row["density"] for row in found if row["density"]]
    assert shares[0] <= shares[-1]


def test_what_a_tokenizer_returns_is_one_batch(model, sae, batches):
    """A mapping of arguments is one batch: its keys are not the texts."""
    index = sh.survey(model, sae, {"input_ids": batches[0], "attention_mask": torch.ones_like(batches[0])})
    assert torch.equal(index.counts, sh.survey(model, sae, batches[:1]).counts)
    assert index.sequences == len(batches[0])
    rows = list(sh.harvest(model, {"input_ids": batches[0]}, SITE))
    assert torch.equal(torch.cat(rows), torch.cat(list(sh.harvest(model, batches[:1], SITE))))
    with pytest.raises(ConfigError, match="expected batches of the model's inputs, got SAE"):
        sh.survey(model, sae, sae)
