"""``measure`` on every kind of model and call, against plain hooks that know nothing of saehooks."""

from __future__ import annotations

import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import saehooks as sh
from saehooks.errors import ConfigError, NeverFiredError, SaehooksError, WhereError

WORDS, WIDTH, PAD = 64, 32, 2
ROWS = [[0, 5, 6, 7, 8, 9, 20, 21], [0, 10, 11, 30], [0, 12, 33, 3, 4]]
TEXT = torch.tensor([[0, 5, 6, 7, 8, 9]])


def relu_sae(width: int = WIDTH, latents: int = 48, seed: int = 1) -> sh.SAE:
    torch.manual_seed(seed)
    return sh.SAE(width, latents, "linear", "relu").eval()


def codes_of(sae, x):
    w = sae.dictionary
    return torch.relu((x - w.b_dec) @ w.W_enc + w.b_enc)


def recons_of(sae, x):
    return codes_of(sae, x) @ sae.dictionary.W_dec + sae.dictionary.b_dec


@contextmanager
def instead(module, change, columns=slice(None)):
    """The module's output replaced at some columns, by a plain hook; gives the list of what passed there."""
    seen = []

    def hook(_, args, output):
        x = output[0] if isinstance(output, tuple) else output
        seen.append(x[:, columns].detach())
        new = x.clone()
        new[:, columns] = change(x[:, columns])
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def three(module, sae, ce, columns=slice(None)):
    """A cross-entropy clean, spliced and zero-ablated, and what the module put out there."""
    with instead(module, lambda x: x, columns) as seen:
        clean = ce()
    with instead(module, lambda x: recons_of(sae, x), columns):
        spliced = ce()
    with instead(module, torch.zeros_like, columns):
        zero = ce()
    return {"ce_clean": clean, "ce_spliced": spliced, "ce_zero": zero}, seen[0]


def next_token(logits, ids):
    return float(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum"))


@torch.no_grad()
def alone(call, module, sae, rows, columns):
    """Every figure of texts, each by itself, by formula; the SAE at ``columns(length)``."""
    sums, rows_of_x = dict.fromkeys(("ce_clean", "ce_spliced", "ce_zero", "kl"), 0.0), []
    for row in rows:
        ids, places = torch.tensor([row]), columns(len(row))
        found, x = three(module, sae, lambda ids=ids: next_token(call(ids), ids), places)
        for name, value in found.items():
            sums[name] += value
        with instead(module, lambda x: recons_of(sae, x), places):
            spliced = call(ids)[0, :-1].log_softmax(-1)
        clean = call(ids)[0, :-1].log_softmax(-1)
        sums["kl"] += float((clean.exp() * (clean - spliced)).sum())
        rows_of_x.append(x[0])
    n = sum(len(row) - 1 for row in rows)
    x = torch.cat(rows_of_x).double()
    made, codes = recons_of(sae, x.float()).double(), codes_of(sae, x.float())
    return {
        **{name: total / n for name, total in sums.items()},
        "nmse": float((made - x).square().sum() / x.square().sum()),
        "fvu": float((made - x).square().sum() / (x - x.mean(0)).square().sum()),
        "cosine": float(((made * x).sum(-1) / made.norm(dim=-1) / x.norm(dim=-1)).mean()),
        "shrinkage": float((made.norm(dim=-1) / x.norm(dim=-1)).mean()),
        "reconstruction_bias": float(made.square().sum() / (made * x).sum()),
        "l0": float((codes > 0).sum(-1).double().mean()),
        "dead": int((codes > 0).any(0).logical_not().sum()),
        "n_tokens": len(x),
        "n_predictions": n,
    }


def agree(found, right, names=None):
    for name in names or right:
        assert found[name] == pytest.approx(right[name], rel=2e-4, abs=2e-5), name


def padded(rows, side):
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


def after_first(n):
    return [*range(1, n)]


@pytest.fixture
def hf():
    """Makes a tiny Hugging Face model of a kind: ``hf("BertForMaskedLM", num_labels=3)``."""
    transformers = pytest.importorskip("transformers")
    shared = {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    shared |= {"intermediate_size": 48, "initializer_range": 0.3, "pad_token_id": PAD}
    t5 = {"vocab_size": WORDS, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    t5 |= {"decoder_start_token_id": 0, "pad_token_id": PAD, "initializer_factor": 3.0}

    def make(kind, **settings):
        torch.manual_seed(0)
        cls = getattr(transformers, kind)
        return cls(cls.config_class(**{**(t5 if kind.startswith("T5") else shared), **settings})).eval()

    return make


# ------------------------------------------------------------------ which texts


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_measures_as_its_texts_alone(tiny_hf, side):
    """Every figure of a batch padded left or right is that of the texts one by one, by formula."""
    sae = relu_sae()
    right = alone(lambda ids: tiny_hf(ids).logits, tiny_hf.model.layers[1], sae, ROWS, after_first)
    ids, mask = padded(ROWS, side)
    with sh.measure(tiny_hf, sae, "model.layers.1", where=slice(1, None)) as live, torch.no_grad():
        tiny_hf(ids, attention_mask=mask)
    agree(live.summary(), right)


@pytest.mark.parametrize("side", ["left", "right"])
def test_strings_on_a_bridge(tiny_hf, tiny_tokenizer, side):
    """A list of strings that the bridge pads measures as the texts one by one; so does each string alone."""
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    sae, module = relu_sae(), tiny_hf.model.layers[1]
    right = alone(lambda ids: tiny_hf(ids).logits, module, sae, ROWS, after_first)
    tiny_tokenizer.padding_side = side
    model = bridges.TransformerBridge.boot_transformers("tiny", hf_model=tiny_hf, tokenizer=tiny_tokenizer).eval()
    texts = [" ".join(f"w{token - 3}" for token in row[1:]) for row in ROWS]
    for calls in ([texts], texts):
        at = "blocks.1.hook_resid_post"
        with sh.measure(model, sae, at, where=slice(1, None)) as live, torch.no_grad():
            for call in calls:
                model(call)
        agree(live.summary(), right)


def test_texts_of_one_token_are_skipped_and_counted(tiny_hf):
    """A text of one token predicts nothing: the figures are those of the others, and it is counted."""
    sae, at = relu_sae(), "model.layers.1"
    ids, mask = padded([[0], *ROWS, [0]], "left")
    right = alone(lambda ids: tiny_hf(ids).logits, tiny_hf.model.layers[1], sae, ROWS, after_first)
    with sh.measure(tiny_hf, sae, at, where=slice(1, None)) as live, torch.no_grad():
        tiny_hf(ids, attention_mask=mask)
        tiny_hf(torch.tensor([[7]]))
    agree(live.summary(), right, [name for name in right if name != "dead"])
    assert live.summary()["n_skipped"] == 3
    assert "texts skipped" in repr(live)
    with pytest.raises(NeverFiredError, match="2 texts"), sh.measure(tiny_hf, sae, at):
        tiny_hf(torch.tensor([[7], [8]]))


def test_positions_that_no_text_has(tiny_hf):
    """``where`` that nothing reached is an error when the block ends, and names the position; in one shot too."""
    for use in (
        lambda: sh.measure(tiny_hf, relu_sae(), [TEXT], "model.layers.1", where=[500]),
        lambda: run_block(tiny_hf, relu_sae(), where=[500]),
    ):
        with pytest.raises(WhereError, match="500"):
            use()


def run_block(model, sae, at="model.layers.1", call=None, **options):
    with sh.measure(model, sae, at, **options) as live:
        call() if call is not None else model(TEXT)
    return live.summary()


# ---------------------------------------------------------- what is predicted


def test_labels_say_which_tokens_count(tiny_hf):
    """With -100 on the prompt only the answer counts, in all three runs, as the model's own loss counts it."""
    sae, labels = relu_sae(), TEXT.clone()
    labels[:, :3] = -100

    def ce():
        return float(F.cross_entropy(tiny_hf(TEXT).logits[0, 2:-1], TEXT[0, 3:]))

    right, _ = three(tiny_hf.model.layers[1], sae, ce)
    found = run_block(tiny_hf, sae, call=lambda: tiny_hf(TEXT, labels=labels))
    agree(found, right)
    assert found["n_predictions"] == 3
    assert found["ce_clean"] == pytest.approx(float(tiny_hf(TEXT, labels=labels).loss), rel=1e-5)


def test_masked_language_models(hf):
    """A masked language model is compared at its labels' own columns, wrapped or not; without labels it is refused."""
    model, sae = hf("BertForMaskedLM"), relu_sae()
    labels = torch.full_like(TEXT, -100)
    labels[0, 3], labels[0, 1] = 7, 9

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, labels=None):
            return self.inner(input_ids, labels=labels)

    def ce():
        return float(F.cross_entropy(model(TEXT).logits[0, [1, 3]], labels[0, [1, 3]]))

    right, _ = three(model.bert.encoder.layer[0], sae, ce)
    for one, at in ((model, "bert.encoder.layer.0"), (Wrapped(), "inner.bert.encoder.layer.0")):
        agree(run_block(one, sae, at, lambda one=one: one(TEXT, labels=labels)), right)
        with pytest.raises(ConfigError, match="labels="):
            run_block(one, sae, at, lambda one=one: one(TEXT))


class Bidirectional(nn.Module):
    """Sees later tokens, and no name says so."""

    def __init__(self, last_layer=False):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.site, self.last_layer = nn.Linear(WIDTH, WIDTH), last_layer

    def forward(self, ids):
        x = self.embed(ids)
        mixed = self.site(x + x.mean(1, keepdim=True)) if self.last_layer else self.site(x)
        return self.head(torch.tanh(mixed) if self.last_layer else torch.tanh(mixed + mixed.mean(1, keepdim=True)))


@pytest.mark.parametrize("last_layer", [True, False])
def test_a_model_that_sees_later_tokens_is_refused(last_layer):
    """Whatever it is called: changing the last token must change no earlier logit."""
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="sees what it would have to predict"):
        run_block(Bidirectional(last_layer).eval(), relu_sae(), "site")


@pytest.mark.parametrize("site", ["encoder.block.0", "decoder.block.0"])
def test_encoder_decoders(hf, site):
    """T5 is compared by its labels at either side, -100 left out; without them it is refused."""
    model, sae = hf("T5ForConditionalGeneration"), relu_sae()
    labels = torch.tensor([[7, 9, 11, -100]])

    def ce():
        return float(F.cross_entropy(model(TEXT, labels=labels).logits[0, :3], labels[0, :3]))

    right, _ = three(model.get_submodule(site), sae, ce)
    agree(run_block(model, sae, site, lambda: model(TEXT, labels=labels)), right)
    with pytest.raises(ConfigError, match="labels="):
        run_block(model, sae, site, lambda: model(TEXT, decoder_input_ids=TEXT))


def test_classifiers(hf):
    """A classifier is compared by the label of each text, one of each token by theirs; without labels it is refused."""
    sae, site, ids = relu_sae(), "bert.encoder.layer.0", torch.cat([TEXT, TEXT + 20])
    for kind, labels in (
        ("BertForSequenceClassification", torch.tensor([2, 0])),
        ("BertForTokenClassification", torch.tensor([[-100, 0, 1, 2, -100, 1]] * 2)),
    ):
        model = hf(kind, num_labels=3)

        def ce(model=model, labels=labels):
            return float(F.cross_entropy(model(ids).logits.flatten(0, -2), labels.flatten()))

        right, _ = three(model.get_submodule(site), sae, ce)
        found = run_block(model, sae, site, lambda model=model, labels=labels: model(ids, labels=labels))
        agree(found, right)
        assert found["n_predictions"] == int((labels != -100).sum())
        with pytest.raises(ConfigError, match="labels="):
            run_block(model, sae, site, lambda model=model: model(ids))
    regression = hf("BertForSequenceClassification", num_labels=1)
    with pytest.raises(ConfigError, match="whole numbers"):
        run_block(regression, sae, site, lambda: regression(ids, labels=torch.tensor([0.5, 1.0])))


def test_pictures_without_labels_are_compared_by_what_comes_out():
    """A picture model of no known kind is compared by the cosine of its output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 4, 4), nn.Flatten(2), Swapped(), nn.Linear(WIDTH, WIDTH), Mean())
    sae, images = relu_sae(), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        clean = model(images)
        with instead(model[3], lambda x: recons_of(sae, x)):
            spliced = model(images)
    found = sh.measure(model, sae, images, "3")
    assert found["cos_spliced"] == pytest.approx(float(F.cosine_similarity(clean, spliced).mean()), abs=1e-6)
    assert found["n_images"] == 3
    assert found["n_tokens"] == 3 * 16


def test_vision_models_of_hugging_face():
    """A picture classifier is compared by its labels, and refused without; one without a head by what it pools."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3, initializer_range=0.3)
    model, sae = transformers.ViTForImageClassification(config).eval(), relu_sae()
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 2, 1, 1])
    site = next(name for name, one in model.named_modules() if type(one).__name__ == "ViTLayer")

    def ce():
        return float(F.cross_entropy(model(pixel_values=images).logits, labels))

    right, _ = three(model.get_submodule(site), sae, ce)
    agree(sh.measure(model, sae, [{"pixel_values": images, "labels": labels}], site), right)
    with pytest.raises(ConfigError, match="labels="):
        sh.measure(model, sae, images, site)
    bare = transformers.ViTModel(config).eval()
    site = next(name for name, one in bare.named_modules() if type(one).__name__ == "ViTLayer")
    with torch.no_grad():
        clean = bare(images).pooler_output
        with instead(bare.get_submodule(site), lambda x: recons_of(sae, x)):
            spliced = bare(images).pooler_output
    found = sh.measure(bare, sae, images.split(2), site)
    assert found["cos_spliced"] == pytest.approx(float(F.cosine_similarity(clean, spliced).mean()), abs=1e-5)
    assert found["n_images"] == 4


def test_hooked_vision_models():
    """A model with hook points that reads pictures, as ViT-Prisma's do, is compared by the cosine of its output."""
    lens = pytest.importorskip("transformer_lens")
    points = pytest.importorskip("transformer_lens.hook_points")
    base = lens.HookedRootModule if hasattr(lens, "HookedRootModule") else points.HookedRootModule

    class HookedViT(base):
        def __init__(self):
            super().__init__()
            self.embed, self.mix = nn.Conv2d(3, WIDTH, 4, 4), nn.Linear(WIDTH, WIDTH)
            self.cls_token, self.head = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Linear(WIDTH, 10)
            self.hook_resid_post = points.HookPoint()
            self.setup()

        def forward(self, input, stop_at_layer=None):
            patches = self.embed(input).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(len(input), -1, -1), patches], 1)
            x = self.hook_resid_post(torch.tanh(self.mix(x)))
            return self.head(x.mean(1) + x[:, 0])

    torch.manual_seed(0)
    model, sae, images = HookedViT().eval(), relu_sae(), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        clean = model(images)
        with instead(model.hook_resid_post, lambda x: recons_of(sae, x)):
            spliced = model(images)
    right = float(F.cosine_similarity(clean, spliced).mean())
    assert sh.measure(model, sae, images.split(2), "hook_resid_post")["cos_spliced"] == pytest.approx(right, abs=1e-6)
    found = run_block(model, sae, "hook_resid_post", lambda: model(images))
    assert found["cos_spliced"] == pytest.approx(right, abs=1e-6)
    assert found["n_tokens"] == 4 * 17


class Swapped(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


# ------------------------------------------------------------------ kinds of calls


def test_two_blocks_at_once_report_what_each_reports_alone(tiny_hf):
    """Nested blocks, also one on a model and one on what wraps it, do not see each other."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = tiny_hf

        def forward(self, ids):
            return self.lm(ids)

    one, two, outer = relu_sae(seed=1), relu_sae(seed=2), Wrapped()
    right = [run_block(tiny_hf, one, "model.layers.0"), run_block(tiny_hf, two, "model.layers.1")]
    with (
        sh.measure(tiny_hf, one, "model.layers.0") as first,
        sh.measure(outer, two, "lm.model.layers.1") as second,
        sh.measure(tiny_hf, two, "model.layers.1") as third,
    ):
        outer(TEXT)
    assert [live.calls for live in (first, second, third)] == [1, 1, 1]
    assert first.summary() == pytest.approx(right[0], rel=1e-5)
    assert second.summary() == pytest.approx(right[1], rel=1e-5)
    assert third.summary() == pytest.approx(right[1], rel=1e-5)


def test_other_blocks_neither_record_nor_train_on_the_runs_in_between(tiny_hf):
    """A trace holds the user's calls alone, a training takes their rows alone; an edit outside acts in every run."""
    sae, at = relu_sae(), "model.layers.1"
    with (
        sh.measure(tiny_hf, sae, at),
        sh.read(tiny_hf, sae, at="model.layers.2", keep_all=True) as trace,
        sh.train(tiny_hf, relu_sae(seed=3), at="model.layers.2", batch_size=4, where=sh.everywhere) as trainer,
        torch.no_grad(),
    ):
        tiny_hf(TEXT)
        tiny_hf(TEXT + 7)
    assert (trace.calls, len(trace.forwards)) == (2, 2)
    assert trainer.rows_seen == 12
    with torch.no_grad():
        right = codes_of(sae, tiny_hf(TEXT + 7, output_hidden_states=True).hidden_states[3])
    assert torch.allclose(trace.codes.dense(), right, atol=1e-4)
    with sh.steer(tiny_hf, sae, {3: 9.0}, at="model.layers.0", where=sh.everywhere):
        inside = run_block(tiny_hf, sae)

    def steered(x):
        return x + 9 * sae.dictionary.W_dec[3]

    with instead(tiny_hf.model.layers[0], steered):
        right, _ = three(
            tiny_hf.model.layers[1], sae, lambda: next_token(tiny_hf(TEXT).logits, TEXT) / (TEXT.shape[1] - 1)
        )
    agree(inside, right)


def test_a_cache_is_refused_under_any_name(tiny_hf):
    """A call that brings a cache is refused before anything runs, and the cache stays as it was."""
    transformers = pytest.importorskip("transformers")

    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = tiny_hf

        def forward(self, ids, memory=None):
            return self.lm(ids, past_key_values=memory, use_cache=True)

    for model, at, name in ((tiny_hf, "model.layers.1", "past_key_values"), (Renamed(), "lm.model.layers.1", "memory")):
        cache = transformers.DynamicCache(config=tiny_hf.config)
        with pytest.raises(ConfigError, match="cache"), sh.measure(model, relu_sae(), at):
            model(TEXT, **{name: cache})
        assert cache.get_seq_length() == 0


def test_the_sae_computes_in_its_own_precision_under_autocast(tiny_hf):
    """Under bfloat16 autocast NMSE and L0 are those of float32 arithmetic on the same activations."""
    sae, seen = relu_sae(), []
    handle = tiny_hf.model.layers[1].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = run_block(tiny_hf, sae)
    handle.remove()
    x = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]
    x = x.float()
    with torch.no_grad():
        made = recons_of(sae, x)
        assert found["nmse"] == pytest.approx(float((made - x).square().sum() / x.square().sum()), rel=1e-4)
        assert found["l0"] == pytest.approx(float((codes_of(sae, x) > 0).sum(-1).double().mean()))


class Normed(nn.Module):
    """A language model with a batch norm after the site, whose statistics a forward in train mode updates."""

    def __init__(self):
        super().__init__()
        self.embed, self.site, self.norm = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(WIDTH, WORDS)

    def forward(self, ids):
        x = self.site(self.drop(self.embed(ids)))
        return self.head(self.drop(self.norm(x.transpose(1, 2)).transpose(1, 2)))


def test_statistics_and_random_numbers_are_those_of_one_call():
    """In train mode, which is warned about, all runs draw the same dropout; the user's call alone updates buffers."""
    torch.manual_seed(0)
    model, plain, sae, exact = Normed(), Normed(), relu_sae(), exact_sae()
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(5)
    expected = [plain(TEXT), plain(TEXT)]
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="train mode"), sh.measure(model, exact, "site") as live:
        got = [model(TEXT), model(TEXT)]
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    for (name, one), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other), name
    assert live.summary()["ce_degradation"] == pytest.approx(0, abs=1e-5)  # the same units were dropped
    assert live.summary()["kl"] == pytest.approx(0, abs=1e-5)
    with pytest.warns(UserWarning, match="eval"):
        run_block(model, sae, "site")


def exact_sae():
    """Reconstructs everything: latents are the positive and the negative parts of each coordinate."""
    sae = relu_sae(latents=2 * WIDTH)
    with torch.no_grad():
        both = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
        sae.dictionary.W_dec.copy_(both)
        sae.dictionary.W_enc.copy_(both.T)
        sae.dictionary.b_enc.zero_()
        sae.dictionary.b_dec.zero_()
    return sae


@pytest.mark.parametrize("mode", ["inference", "compiled", "parallel", "bfloat16"])
def test_other_ways_to_call_a_model(tiny_hf, mode):
    """Under inference mode, compiled, in DataParallel and in bfloat16, the figures are those of the blocks."""
    sae = relu_sae()
    model, at = tiny_hf, "model.layers.1"
    if mode == "bfloat16":
        model = tiny_hf.bfloat16()
    if mode == "compiled":
        model = torch.compile(tiny_hf, backend="eager")
    if mode == "parallel":
        model, at = nn.DataParallel(tiny_hf), "module.model.layers.1"
    with torch.inference_mode(mode == "inference"), torch.no_grad():
        found = run_block(model, sae, at, lambda: model(TEXT))
        with sh.splice(model, sae, at=at) as trace:
            spliced = next_token(model(TEXT).logits, TEXT) / 5
        clean = next_token(model(TEXT).logits, TEXT) / 5
    assert found["ce_clean"] == pytest.approx(clean, rel=1e-5)
    assert found["ce_spliced"] == pytest.approx(spliced, rel=1e-5)
    assert found["nmse"] == pytest.approx(trace.nmse, rel=1e-5)


class Shared(nn.Module):
    """One block that runs three times in a forward."""

    def __init__(self):
        super().__init__()
        self.embed, self.block, self.head = (
            nn.Embedding(WORDS, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WORDS),
        )

    def forward(self, ids):
        x = self.embed(ids)
        for _ in range(3):
            x = x + torch.tanh(self.block(x))
        return self.head(x)


class Overwritten(nn.Module):
    """In some texts writes into what an earlier module returned, so that handing it out again would be wrong."""

    def __init__(self):
        super().__init__()
        self.embed, self.site, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, ids):
        x = self.embed(ids)
        if int(ids[0, 0]) > 5:
            with torch.no_grad():
                x.mul_(1.5)
        y = self.site(x)
        return self.head(y + x.mul(2))


class HandedOn(nn.Module):
    """What a module leaves beside its output is used after the site, and used up."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.left = nn.Embedding(WORDS, WIDTH), None

        def forward(self, ids):
            self.left = self.embed(ids) * 3
            return self.embed(ids)

    def __init__(self):
        super().__init__()
        self.first, self.site, self.head = self.First(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, ids):
        y = self.site(self.first(ids))
        left, self.first.left = self.first.left, None
        return self.head(y if left is None else y + left)


@pytest.mark.parametrize(("kind", "site"), [(Shared, "block"), (Overwritten, "site"), (HandedOn, "site")])
def test_modules_that_run_twice_are_written_over_or_handed_on(kind, site):
    """The three cross-entropies are those of plain hooks, call after call."""
    torch.manual_seed(0)
    model, sae = kind().eval(), relu_sae()
    texts = [TEXT, TEXT + 9]

    def ce():
        return sum(next_token(model(ids), ids) for ids in texts) / 10

    right, _ = three(model.get_submodule(site), sae, ce)
    with sh.measure(model, sae, site) as live, torch.no_grad():
        for ids in texts:
            model(ids)
    agree(live.summary(), right)
    agree(sh.measure(model, sae, texts, site), right)


# ------------------------------------------------------------------------ what it costs


def test_layers_before_the_site_are_not_run_three_times(tiny_hf):
    """In a block the first layer runs for the user's call and once more; in one shot, once for each batch."""
    entered = []
    tiny_hf.model.layers[0].mlp.register_forward_pre_hook(lambda *_: entered.append(0))
    tiny_hf.model.layers[3].mlp.register_forward_pre_hook(lambda *_: entered.append(3))
    sae, batches = relu_sae(), [TEXT, TEXT + 7, TEXT + 9, TEXT + 11]
    with sh.measure(tiny_hf, sae, "model.layers.1"), torch.no_grad():
        for batch in batches:
            tiny_hf(batch)
    assert entered.count(0) == 2 * 4 + 1  # once, the first call is tried with another last token
    entered.clear()
    found = sh.measure(tiny_hf, sae, batches, "model.layers.1")
    assert entered.count(0) == 4 + 1
    assert entered.count(3) == 3 * 4 + 2
    assert found["n_predictions"] == 20


def test_the_logits_of_three_runs_are_never_all_there(tiny_hf):
    """At any time at most two runs' logits are alive: the zero-ablated ones become a number at once."""
    alive, most = [], []

    def note(module, args, output):
        alive.append(weakref.ref(output))
        most.append(sum(one() is not None for one in alive))

    tiny_hf.lm_head.register_forward_hook(note)
    sh.measure(tiny_hf, relu_sae(), [TEXT] * 4, "model.layers.1")
    assert len(most) >= 12
    assert max(most) == 2


# ------------------------------------------------------------------------- one shot


def test_one_shot_gives_the_summary_of_the_block(tiny_hf, tiny_bridge, tiny_clip):
    """``sh.measure(model, sae, batches)`` takes tokens, dicts, loaders and one big tensor, and gives a plain dict."""
    sae, at = relu_sae(), "model.layers.1"
    ids, mask = padded(ROWS, "left")
    with sh.measure(tiny_hf, sae, at) as live, torch.no_grad():
        tiny_hf(ids, attention_mask=mask)
    for batches in ({"input_ids": ids, "attention_mask": mask}, [{"input_ids": ids, "attention_mask": mask}]):
        assert sh.measure(tiny_hf, sae, batches, at) == pytest.approx(live.summary(), rel=1e-5)
    texts = torch.randint(3, WORDS, (300, 6))
    whole = sh.measure(tiny_bridge, sae, texts, "blocks.1.hook_resid_post")
    parts = sh.measure(tiny_bridge, sae, at="blocks.1.hook_resid_post", batches=iter(texts.split(64)))
    assert whole == pytest.approx(parts, rel=1e-5)
    assert whole["n_tokens"] == 1800
    sae.cfg.metadata["hook_name"] = "blocks.1.hook_resid_post"
    assert sh.measure(tiny_bridge, sae, texts) == whole
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 1, 0])
    found = sh.measure(
        tiny_clip, relu_sae(), [(images, labels)], "visual.blocks.1.hook_resid_post", prompts=torch.randn(2, 16)
    )
    assert found["n_images"] == 4
    assert 0 <= found["acc_clean"] <= 1
    with pytest.raises(TypeError, match="did you mean at="):
        sh.measure(tiny_hf, sae, [TEXT], hook_name=at)
    with pytest.raises(SaehooksError):
        sh.measure(tiny_hf, sae, "a text instead of batches", at)
    with pytest.raises(NeverFiredError):
        sh.measure(tiny_hf, sae, [], at)


# ------------------------------------------------------------------------ CLIPs


@pytest.fixture
def hf_clip():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = {"vocab_size": WORDS, "hidden_size": 24, "num_attention_heads": 3, "max_position_embeddings": 12}
    text |= {"bos_token_id": 60, "eos_token_id": 63, "pad_token_id": 1}
    vision = {"hidden_size": WIDTH, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    both = {"intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.CLIPConfig(text_config=text | both, vision_config=vision | both, projection_dim=16)
    return transformers.CLIPModel(config).eval()


def test_a_hugging_face_clip(hf_clip):
    """Each tower is measured by its own features, through `get_..._features` and through the whole model."""
    images, ids = torch.randn(3, 3, 16, 16), torch.tensor([[60, 5, 6, 63, 1, 1], [60, 7, 8, 9, 10, 63]])
    mask = (ids != 1).long()
    for tower, width, call, embedding in (
        ("vision", 32, lambda: hf_clip.get_image_features(pixel_values=images), "image_embeds"),
        ("text", 24, lambda: hf_clip.get_text_features(input_ids=ids, attention_mask=mask), "text_embeds"),
    ):
        sae, at = relu_sae(width), f"{tower}_model.encoder.layers.0"
        with torch.no_grad():
            clean = call().pooler_output
            with instead(hf_clip.get_submodule(at), lambda x, sae=sae: recons_of(sae, x)):
                spliced = call().pooler_output
        right = float(F.cosine_similarity(clean, spliced).mean())
        for one in (call, lambda: hf_clip(input_ids=ids, attention_mask=mask, pixel_values=images)):
            found = run_block(hf_clip, sae, at, one)
            if tower == "vision":
                assert found["cos_spliced"] == pytest.approx(right, abs=1e-5), embedding
                assert found["n_images"] == 3
            else:
                assert found["n_texts"] == 2
                assert found["n_tokens"] == int(mask.sum())
    assert sh.measure(hf_clip, relu_sae(), images, "vision_model.encoder.layers.0")["n_images"] == 3


def test_lora_on_a_clip(hf_clip):
    """A new LoRA adds nothing: the CLIP inside it measures as it does alone."""
    peft = pytest.importorskip("peft")
    images, sae = torch.randn(3, 3, 16, 16), relu_sae()
    right = sh.measure(hf_clip, sae, images, "vision_model.encoder.layers.0")
    adapted = peft.get_peft_model(hf_clip, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    at = "base_model.model.vision_model.encoder.layers.0"
    assert sh.measure(adapted, sae, images, at) == pytest.approx(right, rel=1e-4)
    found = run_block(adapted, sae, at, lambda: adapted.get_image_features(pixel_values=images))
    assert found == pytest.approx(right, rel=1e-4)


def test_lora_on_an_open_clip(tiny_clip):
    """LoRA around an open_clip model: its own names, its own methods, the same figures."""
    peft = pytest.importorskip("peft")
    images, sae, at = torch.randn(3, 3, 16, 16), relu_sae(), "visual.blocks.1.hook_resid_post"
    right = sh.measure(tiny_clip, sae, images, at)
    adapted = peft.get_peft_model(tiny_clip, peft.LoraConfig(r=2, target_modules=["c_fc"])).eval()
    assert sh.measure(adapted, sae, images, at) == pytest.approx(right, rel=1e-4)
    assert run_block(adapted, sae, at, lambda: adapted.encode_image(images)) == pytest.approx(right, rel=1e-4)
    both = run_block(adapted, sae, at, lambda: adapted(images, torch.tensor([[60, 5, 6, 63, 0, 0, 0, 0]])))
    assert both["cos_spliced"] == pytest.approx(right["cos_spliced"], rel=1e-4)


def test_harvesting_in_train_mode_warns(tiny_clip):
    """Patches that are dropped at random are no activations of the picture."""
    tiny_clip.visual.patch_dropout = nn.Dropout(0.5)
    tiny_clip.train()
    with pytest.warns(UserWarning, match="train mode"):
        list(sh.harvest(tiny_clip, [torch.randn(2, 3, 16, 16)], "visual.blocks.0.hook_resid_post"))
    with pytest.warns(UserWarning, match="train mode"):
        sh.measure(tiny_clip, relu_sae(), torch.randn(2, 3, 16, 16), "visual.blocks.0.hook_resid_post")
