"""Exact effects are those of the ``ablate`` block, and of a plain hook, on every kind of host and data."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import saehooks as sh
from saehooks import causal
from saehooks.causal.runs import as_data
from saehooks.errors import ConfigError, LatentError, WhereError
from saehooks.hosts import host

WORDS = 64
WIDTH = 32
ROWS = [[0, 5, 6, 7, 8, 9, 20, 21], [0, 10, 11, 30], [0, 12, 33, 3, 4], [0, 40, 41, 42]]


def relu_sae(width: int = WIDTH, latents: int = 48, seed: int = 1) -> sh.SAE:
    torch.manual_seed(seed)
    return sh.SAE(width, latents, "linear", "relu").eval()


def codes_of(sae, x):
    """relu((x - b_dec) W_enc + b_enc), by the formula."""
    w = sae.dictionary
    return torch.relu((x - w.b_dec) @ w.W_enc + w.b_enc)


@contextmanager
def ablated(module, sae, latent, columns):
    """A latent taken out of the module's output at some columns, each time the module runs: no part of saehooks."""

    def hook(_, args, output):
        x = output[0] if isinstance(output, tuple) else output
        new = x.clone()
        part = x[:, columns]
        new[:, columns] = part - codes_of(sae, part)[..., latent, None] * sae.dictionary.W_dec[latent]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def effect_alone(call, module, sae, latent, rows, columns):
    """How the mean cross-entropy of texts rises when a latent is ablated, each text by itself."""
    changes = []
    for row in rows:
        ids = torch.tensor([row])
        clean = F.cross_entropy(call(ids)[0, :-1], ids[0, 1:])
        with ablated(module, sae, latent, columns(len(row))):
            changes.append(float(F.cross_entropy(call(ids)[0, :-1], ids[0, 1:]) - clean))
    return sum(changes) / len(changes)


def active(sae, module, call, n=3):
    """Some latents that fire at a module while ``call`` runs."""
    seen = []
    handle = module.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        call()
    handle.remove()
    return codes_of(sae, seen[0]).flatten(0, -2).sum(0).topk(n).indices.tolist()


def after_first(length):
    return [*range(1, length)]


class Shared(nn.Module):
    """One block that runs three times in a forward, as in ALBERT."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.block = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, ids):
        x = self.embed(ids)
        for _ in range(3):
            x = x + self.block(x)
        return self.head(x)


class Positions(nn.Module):
    """Adds an embedding of the positions that has no batch axis; ``in_place`` writes it into the tokens' own."""

    def __init__(self, in_place=False):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH)
        self.mix, self.head, self.in_place = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS), in_place

    def forward(self, ids):
        x, places = self.wte(ids), self.wpe(torch.arange(ids.shape[1]))
        x = x.add_(places) if self.in_place and not x.requires_grad else x + places
        x = self.mix(x)
        return self.head(torch.tanh(x.cumsum(1)))


class Routed(nn.Module):
    """Batch and positions share one axis before the site."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.site = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids):
        x = self.mix(self.embed(ids).flatten(0, 1)).unflatten(0, ids.shape)
        return self.head(torch.tanh((self.site(x) + x).cumsum(1)))


@pytest.mark.parametrize("pos", [16, 2, 3])
@pytest.mark.parametrize(
    ("make", "site", "resumed"),
    [
        (Shared, "block", 1),
        (Positions, "mix", 1),
        (lambda: Positions(in_place=True), "mix", 0),
        (Routed, "site", 1),
    ],
    ids=["runs three times", "no batch axis", "written in place", "one axis for two"],
)
def test_plain_modules(make, site, resumed, pos):
    """Many texts in forwards of two sizes give what a plain hook gives text by text, however the model is made."""
    torch.manual_seed(0)
    model, sae = make().eval(), relu_sae()
    n = 1024 // pos + 3 if pos == 16 else pos
    texts = torch.randint(3, WORDS, (n, pos), generator=torch.Generator().manual_seed(0))
    wanted = active(sae, model.get_submodule(site), lambda: model(texts))
    found = sh.rank_latents(model, sae, texts, at=site, where=slice(1, None), exact=wanted, progress=False)
    for latent in wanted:
        right = effect_alone(model, model.get_submodule(site), sae, latent, texts.tolist(), after_first)
        assert found.of(latent)["exact"] == pytest.approx(right, abs=2e-6), latent
    assert found.cost["resumed_at_site"] == resumed


def test_latents_that_fire_only_when_a_module_runs_again():
    """A latent that is silent the first time a module runs, and fires the second or third, has its effect alike."""
    torch.manual_seed(0)
    model, sae = Shared().eval(), sh.SAE(WIDTH, 96, "linear", "topk", k=2).eval()
    texts, at = torch.randint(3, WORDS, (3, 5)), {"at": "block", "where": sh.everywhere}
    with torch.no_grad(), sh.read(model, sae, keep_all=True, **at) as trace:
        model(texts)
    fired = [set(one.codes.indices.tolist()) for one in trace.forwards]
    later = sorted((fired[1] | fired[2]) - fired[0])[:3]
    assert later
    found = sh.rank_latents(model, sae, texts, exact=later, progress=False, **at)
    for latent in later:
        with torch.no_grad():
            clean = model(texts)
            with sh.ablate(model, sae, [latent], **at):
                edited = model(texts)
        ce = [F.cross_entropy(run[:, :-1].flatten(0, 1), texts[:, 1:].flatten()) for run in (clean, edited)]
        assert found.of(latent)["exact"] == pytest.approx(float(ce[1] - ce[0]), abs=2e-6)
        assert found.of(latent)["exact"] != 0


@pytest.mark.parametrize(
    ("kind", "at"),
    [
        ("tiny_bridge", "blocks.1.hook_resid_post"),
        ("tiny_hf", "model.layers.1"),
        ("tiny_hf", "model.layers.2.mlp"),
        ("tiny_hf_bridge", "blocks.1.hook_resid_pre"),
    ],
)
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_every_host_of_text(request, kind, at, error):
    """Sets ablated many at once, with the error kept or dropped, are what the block does one by one."""
    model = request.getfixturevalue(kind)
    sae, ids = relu_sae(), torch.tensor([row[:4] for row in ROWS])
    options = {"at": at, "where": slice(1, None)}
    best = causal.rank_latents(model, sae, ids, **options).top(4)
    sets = {str(latent): [latent] for latent in best} | {"all": best}
    found = causal.ablate_sets(model, sae, ids, ablate=sets, error=error, **options)
    for name, latents in sets.items():
        edits = sh.edits.zero(latents)
        with torch.no_grad(), sh.attach(model, sae, edits=edits, error=error, **options):
            logits = getattr(model(ids), "logits", None) if kind == "tiny_hf" else model(ids)
        right = torch.stack([F.cross_entropy(one[:-1], row[1:]) for one, row in zip(logits, ids, strict=True)])
        assert torch.allclose(found.values[found.names.index(name)].float(), right, atol=2e-6), name


@pytest.mark.parametrize(("tower", "width"), [("visual", 32), ("text", 24)])
def test_both_towers_of_a_clip(tiny_clip, tower, width):
    """On a CLIP, ranking by an embedding's direction gives what the block gives."""
    sae, at = relu_sae(width), f"{tower}.blocks.0.hook_resid_post"
    torch.manual_seed(3)
    data, target = torch.randn(5, 3, 16, 16), torch.randn(16)
    if tower == "text":
        data = torch.tensor([[60, 5, 6, 63, 0, 0, 0, 0], [60, 7, 8, 9, 10, 11, 63, 0]])
    encode = tiny_clip.encode_image if tower == "visual" else tiny_clip.encode_text
    metric = causal.embedding_cosine(target)
    found = causal.rank_latents(tiny_clip, sae, data, metric, at=at, where=None, exact=3)
    for latent in found.top(3):
        with torch.no_grad():
            clean = F.cosine_similarity(encode(data), target[None])
            with sh.ablate(tiny_clip, sae, [latent], at=at, where=None):
                changed = F.cosine_similarity(encode(data), target[None])
        assert found.of(latent)["exact"] == pytest.approx(float((changed - clean).mean()), abs=1e-6)


def padded(rows, side):
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 2), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_tokenizer_returns(tiny_hf, side):
    """Padded texts, as a tokenizer returns them, in tensors or lists, are ranked as each text alone."""
    transformers = pytest.importorskip("transformers")
    sae, module = relu_sae(), tiny_hf.model.layers[1]
    ids, mask = padded(ROWS, side)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    tensors = {"input_ids": ids, "attention_mask": mask, "position_ids": places, "token_type_ids": 0 * ids}
    given = {
        "encoding": transformers.BatchEncoding(tensors),
        "lists": {"input_ids": ROWS},
        "loader": [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ROWS[2]}, {"input_ids": ROWS[3]}],
    }
    latent = active(sae, module, lambda: tiny_hf(torch.tensor(ROWS[:1])))[0]
    right = effect_alone(lambda ids: tiny_hf(ids).logits, module, sae, latent, ROWS, after_first)
    for name, data in given.items():
        found = causal.rank_latents(
            tiny_hf, sae, data, at="model.layers.1", where=slice(1, None), exact=[latent], progress=False
        )
        assert found.n_sequences == 4
        assert found.of(latent)["exact"] == pytest.approx(right, abs=2e-6), name


def test_data_that_would_be_read_wrongly_is_refused(tiny_hf):
    """What changes how a text is run, and cannot be kept, is named; floats, gaps and other shapes too."""
    one = host(tiny_hf)
    ids = torch.tensor([[0, 5, 6, 7]])
    with pytest.raises(ConfigError, match="token_type_ids in the data would be lost"):
        as_data(one, {"input_ids": ids, "token_type_ids": torch.tensor([[0, 0, 1, 1]])})
    with pytest.raises(ConfigError, match="labels in the data would be lost"):
        as_data(one, {"input_ids": ids, "labels": torch.tensor([[-100, 5, 6, 7]])})
    with pytest.raises(ConfigError, match="decoder_input_ids"):
        as_data(one, {"input_ids": ids, "decoder_input_ids": ids})
    with pytest.raises(ConfigError, match="gap"):
        as_data(one, {"input_ids": ids, "attention_mask": torch.tensor([[1, 0, 1, 1]])})
    with pytest.raises(ConfigError, match="one shape"):
        as_data(one, {"input_ids": ids, "attention_mask": torch.tensor([[1, 1]])})
    with pytest.raises(ConfigError, match="input_ids or pixel_values, got a mapping of text"):
        as_data(one, {"text": ["a"]})
    with pytest.raises(ConfigError, match="float32"):
        as_data(one, torch.randn(3, 4))
    with pytest.raises(ConfigError, match="batch_size"):
        as_data(one, ids, 0)
    assert [part.inputs.tolist() for part in as_data(one, np.array([[1, 2], [3, 4]])).batches] == [[[1, 2], [3, 4]]]
    assert as_data(one, [np.array([1, 2]), [np.int64(3), np.int64(4)]]).total == 2
    assert as_data(one, {"pixel_values": torch.zeros(2, 3, 4, 4)}).total == 2


def test_a_position_that_only_some_texts_have(tiny_hf):
    """``where=[10]`` acts in the texts that are long enough; an error only when none is."""
    sae, module = relu_sae(), tiny_hf.model.layers[1]
    texts = [[0, 5, 6, 7, 8, 9], [0, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]]
    seen = []
    handle = module.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        tiny_hf(torch.tensor(texts[1:]))
    handle.remove()
    latent = int(codes_of(sae, seen[0])[0, 10].argmax())
    at = {"at": "model.layers.1", "where": [10], "progress": False}
    found = causal.rank_latents(tiny_hf, sae, texts, exact=[latent], **at)
    right = effect_alone(lambda ids: tiny_hf(ids).logits, module, sae, latent, texts, lambda n: [10] if n > 10 else [])
    assert found.of(latent)["exact"] == pytest.approx(right, abs=2e-6)
    with pytest.raises(WhereError, match="10"):
        causal.rank_latents(tiny_hf, sae, texts[:1], exact=[latent], **at)


def test_a_mask_for_each_text(tiny_hf):
    """A mask (n, pos) goes with the texts of the data, however they are cut into forwards."""
    sae, ids = relu_sae(), torch.tensor([row[:4] for row in ROWS])
    mask = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]], dtype=torch.bool)
    at = {"at": "model.layers.1", "where": mask, "progress": False}
    latents = causal.rank_latents(tiny_hf, sae, ids, **at).top(3)
    for size in (4, 3, 1):
        found = causal.rank_latents(tiny_hf, sae, ids, exact=latents, batch_size=size, **at)
        for latent in latents:
            changes = []
            for row, places in zip(ids, mask, strict=True):
                columns = places.nonzero()[:, 0].tolist()
                call = lambda one: tiny_hf(one).logits  # noqa: E731
                module = tiny_hf.model.layers[1]
                changes.append(effect_alone(call, module, sae, latent, [row.tolist()], lambda n, c=columns: c))
            assert found.of(latent)["exact"] == pytest.approx(sum(changes) / 4, abs=2e-6)
    with pytest.raises(WhereError, match="a row for each sequence"):
        causal.rank_latents(tiny_hf, sae, ids, at="model.layers.1", where=mask[:2], batch_size=1)


def test_how_many_to_ablate_may_be_any_whole_number(tiny_hf):
    """``exact=`` takes the numbers of numpy and torch, and arrays of latents; what is wrong is said before any run."""
    sae, ids = relu_sae(), torch.tensor([ROWS[1], ROWS[3]])
    at = {"at": "model.layers.1", "progress": False}
    plain = causal.rank_latents(tiny_hf, sae, ids, exact=3, **at)
    for three in (np.int64(3), torch.tensor(3)):
        assert causal.rank_latents(tiny_hf, sae, ids, exact=three, **at).exact[:3].tolist() == plain.exact[:3].tolist()
    listed = causal.rank_latents(tiny_hf, sae, ids, exact=np.array(plain.top(2)), **at)
    assert sorted(listed.top(2)) == sorted(plain.top(2))
    runs = []
    handle = tiny_hf.register_forward_pre_hook(lambda *_: runs.append(1))
    for wrong, error in ((-1, ConfigError), ([99], LatentError), (2.5, LatentError)):
        with pytest.raises(error):
            causal.rank_latents(tiny_hf, sae, ids, exact=wrong, **at)
    with pytest.raises(LatentError):
        causal.rank_latents(tiny_hf, sae, ids, latents=[99], **at)
    handle.remove()
    assert not runs


def test_a_curve_draws_as_many_latents_as_it_says(tiny_hf):
    """Where fewer latents are active than are to be drawn at random, a curve is refused."""
    torch.manual_seed(0)
    sae = sh.SAE(WIDTH, 48, "linear", "topk", k=1).eval()
    ids = torch.tensor([[0, 5, 6]])
    pool = causal.rank_latents(tiny_hf, sae, ids, at="model.layers.1", where=None)
    assert len(pool) <= 3
    with pytest.raises(ConfigError, match=f"only {len(pool)} latents are active"):
        causal.curve(tiny_hf, sae, ids, list(range(8)), at="model.layers.1", where=None, counts=(1, 4))
    with pytest.raises(ConfigError, match="draws"):
        causal.curve(tiny_hf, sae, ids, list(range(8)), at="model.layers.1", where=None, counts=(1,), draws=0)


def dropout(rate):
    layer = nn.Linear(4, 4)
    layer.drop_path_rate = rate
    return layer


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (nn.Dropout(0.1), "Dropout"),
        (nn.MultiheadAttention(4, 2, dropout=0.2), "dropout=0.2"),
        (nn.BatchNorm1d(4), "BatchNorm1d"),
        (dropout(0.1), "drop_path_rate=0.1"),
        (nn.Dropout(0.0), None),
        (dropout(0.0), None),
        (nn.LayerNorm(4), None),
    ],
)
def test_a_model_in_train_mode(part, said):
    """Ranking on a model whose dropout or batch norm is at work warns and names it; it is left in train mode."""
    torch.manual_seed(0)
    model, sae = Positions(), relu_sae()
    model.part = part
    texts = torch.randint(3, WORDS, (2, 5))
    for training in (True, False):
        model.train(training)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            causal.rank_latents(model, sae, texts, at="mix", exact=1, progress=False)
        heard = [str(one.message) for one in caught if "train mode" in str(one.message)]
        assert len(heard) == (training and said is not None)
        assert all(said in one and "eval()" in one for one in heard)
        assert model.training is training


def test_the_next_token_of_a_model_that_does_not_predict_it():
    """Ranking a masked language model by next-token cross-entropy is refused; by a metric of one's own it works."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=48, initializer_range=0.3)
    model, sae, at = transformers.BertForMaskedLM(config).eval(), relu_sae(), "bert.encoder.layer.0"
    ids = torch.tensor([[3, 5, 6, 4, 8, 9]])
    for use in (
        lambda: causal.rank_latents(model, sae, ids, at=at),
        lambda: causal.ablate_sets(model, sae, ids, ablate={"a": [1]}, at=at),
        lambda: causal.latent_graph(model, {at: sae, "bert.encoder.layer.1": relu_sae(seed=2)}, ids),
    ):
        with pytest.raises(ConfigError, match="BertForMaskedLM does not predict the next token"):
            use()
    found = causal.rank_latents(model, sae, ids, lambda logits: logits[:, 3, 7], at=at, exact=2)
    with torch.no_grad(), ablated(model.bert.encoder.layer[0], sae, found.top(1)[0], slice(None)):
        right = float(model(ids).logits[0, 3, 7]) - found.clean
    assert found.of(found.top(1)[0])["exact"] == pytest.approx(right, abs=2e-6)


def test_images_on_a_hugging_face_clip():
    """A CLIP of Hugging Face is ranked by its image features."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    both = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": WIDTH}
    config = transformers.CLIPConfig(
        text_config=both | {"vocab_size": WORDS}, vision_config=both | {"image_size": 16, "patch_size": 4}
    )
    model, sae, at = transformers.CLIPModel(config).eval(), relu_sae(), "vision_model.encoder.layers.0"
    images, target = torch.randn(3, 3, 16, 16), torch.randn(512)
    found = causal.rank_latents(
        model, sae, {"pixel_values": images}, causal.embedding_cosine(target), at=at, where=sh.everywhere, exact=2
    )

    def cosine():
        return F.cosine_similarity(model.get_image_features(pixel_values=images).pooler_output, target[None]).mean()

    with torch.no_grad():
        clean = cosine()
        with ablated(model.get_submodule(at), sae, found.top(1)[0], slice(None)):
            right = float(cosine() - clean)
    assert found.of(found.top(1)[0])["exact"] == pytest.approx(right, abs=1e-6)
