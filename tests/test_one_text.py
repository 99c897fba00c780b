"""One text, one answer: hosts x ways of calling x rules, each against every text by itself (tests/one_text.py).

| hosts | ways | rules | cells |
|---|---|---|---|
| Llama, GPT-2, Gemma 3 (sliding and full layers), OPT, Mamba | the 20 of WAYS | 10 | 950, by default 288 |
| TransformerBridge over a Llama | strings and tokens, on either side, generated with and without cache | 8 | 56 |
| T5, encoder and decoder | generated with and without cache, in beams | 5 | 30 |
| BERT; torch's TransformerEncoder, (batch, pos) and (pos, batch) | padded batches | 10; 4 | 36 |
| LLaVA, text and pictures; Hugging Face's CLIP, both towers | calls, generated | 10; 4; 6 | 31 |

``MATRIX=all`` tries all; by default each decoder and way is tried with three rules, so that neighbours differ. Of the
950, 30 are refused by the host itself (IMPOSSIBLE), with its own error; what a host does not have is in APART.
Diffusion models, whose positions are places of a picture, are in tests/hosts/test_diffusion.py, HookedTransformers in
tests/legacy.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import Any, NamedTuple

import pytest
import torch
from one_text import (
    BOS,
    DECODERS,
    IMAGE,
    LATENT,
    OF_TOKENS,
    OTHER,
    PAD,
    REPEATING,
    ROWS,
    RULES,
    STEP,
    Decoder,
    arrow,
    bert,
    edited,
    hugging_face_clip,
    llama,
    llava,
    new_sae,
    padded,
    same,
    t5,
)
from torch import nn

import saehooks as sh

pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("few_threads")]


@pytest.fixture
def few_threads():
    """Tiny models are fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def decoder(name: str) -> Decoder:
    make, site = DECODERS[name]
    return Decoder(name, make(), site)


@functools.cache
def assistant():
    return llama(seed=5)


# ------------------------------------------------------------- ways of calling


def alone(host, rule):
    """Each text by itself."""
    with torch.no_grad(), host.steer(rule):
        found = [host.model(torch.tensor([row])).logits[0] for row in ROWS]
    return [(one, host.logits(row, rule)) for one, row in zip(found, ROWS, strict=True)]


def batch(host, rule, side):
    """A batch padded on one side."""
    ids, mask = padded(ROWS, side)
    place = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if host.takes("position_ids") else {}
    with torch.no_grad(), host.steer(rule):
        found = host.model(ids, attention_mask=mask, **place).logits
    return [(found[i, mask[i].bool()], host.logits(row, rule)) for i, row in enumerate(ROWS)]


def embeddings(host, rule):
    """Embeddings in place of tokens, padded on the right."""
    ids, mask = padded(ROWS, "right")
    embeds = host.model.get_input_embeddings()(ids)
    with torch.no_grad(), host.steer(rule):
        found = host.model(inputs_embeds=embeds, attention_mask=mask).logits
    return [(found[i, mask[i].bool()], host.logits(row, rule)) for i, row in enumerate(ROWS)]


def part(host, rule):
    """The model without its head, after another call of the whole."""
    inner = host.model.base_model
    with torch.no_grad(), host.steer(rule):
        host.model(torch.tensor([REPEATING]))
        found = [inner(torch.tensor([row]))[0][0] for row in ROWS]
    return [(one, host.logits(row, rule, call=inner)) for one, row in zip(found, ROWS, strict=True)]


def packed(host, rule):
    """Several texts in one row, told apart by their position ids."""
    row, place = [t for row in ROWS for t in row], [p for row in ROWS for p in range(len(row))]
    with torch.no_grad(), host.steer(rule):
        found = host.model(torch.tensor([row]), position_ids=torch.tensor([place]), use_cache=False).logits[0]
    parts = found.split([len(row) for row in ROWS])
    return [(one, host.logits(row, rule)) for one, row in zip(parts, ROWS, strict=True)]


def by_hand(host, rule):
    """Two texts at once, word by word on the cache that each returned."""
    texts, prompt, outputs = (ROWS[0], OTHER), 4, []
    with torch.no_grad(), host.steer(rule):
        for text in texts:
            outputs.append([host.model(torch.tensor([text[:prompt]]), use_cache=True)])
        for word in range(prompt, len(ROWS[0])):
            for text, done in zip(texts, outputs, strict=True):
                cache = {name: done[-1][name] for name in ("past_key_values", "cache_params") if name in done[-1]}
                done.append(host.model(torch.tensor([[text[word]]]), use_cache=True, **cache))
    joined = [torch.cat([one.logits[0] for one in done]) for done in outputs]
    return [(one, host.logits(text, rule, prompt)) for one, text in zip(joined, texts, strict=True)]


def generate(host, rule, rows=ROWS, new=4, model=None, site=None, run=None, **how):
    """Greedy generation from a batch padded on the left."""
    ids, mask = padded(rows, "left")
    wanted = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, "max_new_tokens": new}
    with host.steer(rule, model, site):
        found = (run or model or host.model).generate(ids, attention_mask=mask, **wanted, **how)
    pairs = []
    for i, row in enumerate(rows):
        words, logits = host.written(row, rule, new)
        pairs.append((torch.stack(found.logits, 1)[i], logits))
        pairs.append((found.sequences[i, ids.shape[1] :].float(), torch.tensor(words).float()))
    return pairs


def beams(host, rule, rows=ROWS, **how):
    """Beam search from a batch padded on the left."""
    ids, mask = padded(rows, "left")
    settings = {"num_beams": 2, "max_new_tokens": 4, "num_return_sequences": 2}
    with host.steer(rule):
        found = host.model.generate(ids, attention_mask=mask, do_sample=False, **settings, **how)
    new = found[:, ids.shape[1] :].float().reshape(len(rows), 2, -1)
    return [(new[i], torch.tensor(host.beams(row, rule, **settings)).float()) for i, row in enumerate(rows)]


def second_turn(host, rule):
    """A second generation on the cache of the first: positions of the second turn are of the whole chat."""
    import transformers

    cache = transformers.DynamicCache(config=host.model.config)
    name = "cache" if host.takes("cache") else "past_key_values"
    how = {"do_sample": False, "max_new_tokens": 3, name: cache, "return_dict_in_generate": True, "output_logits": True}
    with host.steer(rule):
        first = host.model.generate(torch.tensor([ROWS[0]]), **how).sequences
        text = torch.cat([first, torch.tensor([[11, 12, 13]])], 1)
        second = host.model.generate(text, **how)
    at, kept = RULES[rule][1], first.shape[1] - 1  # the first turn's last word was not read yet
    row, pairs = text[0].tolist(), []
    for logits in second.logits:
        words = tuple(row)
        at_token = lambda _, p, t=words: at(p, text.shape[1] if p >= kept else len(ROWS[0]), t[p])  # noqa: E731
        with torch.no_grad(), edited(host.module, host.arrow, at_token):
            right = host.model(torch.tensor([row]), use_cache=False).logits[0, -1]
        pairs.append((logits[0], right))
        row.append(int(right.argmax()))
    return pairs


class Scorer(nn.Module):
    """A language model inside a class of the user's own."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, words, real=None):
        return self.lm(words, attention_mask=real)

    def generate(self, *args, **kwargs):
        return self.lm.generate(*args, **kwargs)


class Taken(NamedTuple):
    """A method that was taken from the model before the block."""

    generate: Any


def threads(host, rule):
    """Two threads that run the model at the same time inside one block."""
    found: dict[int, torch.Tensor] = {}

    def run(i, row):
        for _ in range(3):
            with torch.no_grad():
                found[i] = host.model(torch.tensor([row])).logits[0]

    with host.steer(rule):
        workers = [threading.Thread(target=run, args=pair) for pair in enumerate(ROWS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return [(found[i], host.logits(row, rule)) for i, row in enumerate(ROWS)]


WAYS = {
    "alone": alone,
    "left": lambda host, rule: batch(host, rule, "left"),
    "right": lambda host, rule: batch(host, rule, "right"),
    "embeddings": embeddings,
    "part": part,
    "packed": packed,
    "by hand": by_hand,
    "threads": threads,
    "generate": generate,
    "generate without cache": lambda host, rule: generate(host, rule, use_cache=False),
    "static cache": lambda host, rule: generate(host, rule, cache_implementation="static"),
    "prefill in chunks": lambda host, rule: generate(host, rule, [REPEATING, ROWS[0]], prefill_chunk_size=5),
    "prompt lookup": lambda host, rule: generate(host, rule, [REPEATING], 8, prompt_lookup_num_tokens=3),
    "assisted": lambda host, rule: generate(host, rule, [REPEATING], 8, assistant_model=assistant()),
    "second turn": second_turn,
    "beams": beams,
    "beams without cache": lambda host, rule: beams(host, rule, use_cache=False),
    "method taken before": lambda host, rule: generate(
        host, rule, run=Taken(host.model.generate), use_cache=host.name == "mamba"
    ),
    "in a class": lambda host, rule: generate(host, rule, model=Scorer(host.model), site=f"lm.{host.site}"),
    "in DataParallel": lambda host, rule: generate(host, rule, model=nn.DataParallel(host.model), run=host.model),
}

IMPOSSIBLE = {
    ("mamba", "prefill in chunks"): "Cannot use prefill chunking",
    ("mamba", "prompt lookup"): "not supported with stateful models",
    ("mamba", "assisted"): "not supported with stateful models",
}
"""What the host itself refuses."""

APART = {("mamba", "packed"), ("gpt2", "packed"), ("opt", "packed"), ("mamba", "second turn")}
"""What the host does not know: packed rows, or a second turn (a state, or a window, cannot go on from a text)."""


def rules_of(name: str, way: str) -> list[str]:
    """The rules that one host and way are tried with."""
    known = [rule for rule in RULES if rule not in OF_TOKENS or "embeddings" not in way]
    if os.environ.get("MATRIX") == "all":
        return known
    start = 3 * (list(DECODERS).index(name) + list(WAYS).index(way))
    return list(dict.fromkeys(known[(start + i) % len(known)] for i in range(3)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_gives_one_text_one_answer(name, way):
    """However a language model is called, a steered text gives what it gives alone."""
    if (name, way) in APART:
        pytest.skip("the host has no such thing")
    host = decoder(name)
    for rule in rules_of(name, way):
        if (name, way) in IMPOSSIBLE:
            with pytest.raises(ValueError, match=IMPOSSIBLE[name, way]):
                WAYS[way](host, rule)
            continue
        for found, right in WAYS[way](host, rule):
            assert same(found, right), f"where={rule}"


# ------------------------------------------------------------- other hosts


@pytest.fixture(scope="module")
def bridged(tiny_tokenizer):
    """A TransformerBridge, and the oracle of a model with the same weights."""
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    inner = llama()
    inner.config.architectures = ["LlamaForCausalLM"]
    bridge = bridges.TransformerBridge.boot_transformers("tiny", hf_model=inner, tokenizer=tiny_tokenizer).eval()
    return bridge, Decoder("llama", llama(), "model.layers.0")


@pytest.mark.parametrize("how", ["strings, left", "strings, right", "tokens", "generate", "no cache", "list", "hf"])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("not_special", "everywhere")])
def test_a_bridge_gives_one_text_one_answer(bridged, rule, how):
    """Strings, lists of them and tokens, read or continued, give what the model inside gives of each text alone."""
    model, host = bridged
    texts = [" ".join(f"w{token - 3}" for token in row[1:]) for row in ROWS]
    block = host.steer(rule, model, "blocks.0.hook_resid_post")
    if how in ("generate", "no cache", "list", "hf"):
        write = model.hf_generate if how == "hf" else model.generate
        options = {"max_new_tokens": 4, "do_sample": False, "return_type": "tokens", "stop_at_eos": False}
        options |= {"use_past_kv_cache": how != "no cache"} if how != "hf" else {}
        with torch.no_grad(), block:
            found = write(texts if how == "list" else torch.tensor(ROWS[:1]), **options)
        for new, row in zip(found[:, -4:].tolist(), ROWS, strict=False):
            assert new == host.written(row, rule, 4)[0]
        return
    with torch.no_grad(), block:
        side = how.rpartition(" ")[2]
        ids, mask = padded(ROWS, side if side in ("left", "right") else "right")
        if how == "tokens":
            found = model(ids, attention_mask=mask)
        else:
            found = model(texts, padding_side=side)
    for i, row in enumerate(ROWS):
        assert same(found[i, mask[i].bool()], host.logits(row, rule))


def places(after, call, block):
    """Where a block changes what the module after the site is given: the columns, for each row."""
    seen = []

    def look(_, args, kwargs):
        seen.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)).clone())

    handle = after.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            call()
            clean = seen[-1]
            with block:
                call()
    finally:
        handle.remove()
    moved = (seen[-1] - clean).abs().amax(-1) > 1e-4
    return [row.nonzero()[:, 0].tolist() for row in moved]


def steering(model, site, where):
    return sh.steer(model, new_sae(), {LATENT: STEP}, at=site, where=where)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", RULES)
def test_bert_counts_the_words_of_each_text(rule, side):
    """A masked language model's batch is edited at the positions of each text."""
    model, (where, at) = bert(), RULES[rule]
    ids, mask = padded(ROWS, side)
    found = places(
        model.bert.encoder.layer[1],
        lambda: model(ids, attention_mask=mask),
        steering(model, "bert.encoder.layer.0", where),
    )
    shift = [0 if side == "right" else ids.shape[1] - len(row) for row in ROWS]
    assert found == [
        [s + p for p, t in enumerate(row) if at(p, len(row), t)] for s, row in zip(shift, ROWS, strict=True)
    ]


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["cache", "no cache", "beams"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("rule", ["0", "sh.last", "~positions(-2)", "function", "left out"])
def test_each_stack_of_t5_counts_its_own(rule, stack, how):
    """In a padded batch, the encoder's positions are those of each text, the decoder's those of its answer."""
    texts, (where, at) = [[5, 6, 7, 8, 9, 10], [11, 12, 13]], RULES[rule]
    model, sae = t5(), new_sae()
    ids, mask = padded(texts, "left")
    settings = {"do_sample": False, "max_new_tokens": 4}
    with sh.steer(model, sae, {LATENT: STEP}, at=f"{stack}.block.0", where=where):
        found = model.generate(ids, attention_mask=mask, **settings, **how)
    seen = []
    model.get_submodule(stack).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("input_ids", args[0] if args else None)), with_kwargs=True
    )
    for i, text in enumerate(texts):
        length = len(text) if stack == "encoder" else 1
        at_token = lambda r, p, n=length: at(p, n, int(seen[-1][r, p]))  # noqa: E731
        with edited(model.get_submodule(stack).block[0], STEP * arrow(sae), at_token):
            right = model.generate(torch.tensor([text]), **settings, **{**how, "use_cache": False})
        assert found[i].tolist() == right[0].tolist()


@pytest.mark.parametrize("rule", RULES)
def test_a_multimodal_model_counts_pictures_and_words_in_one_text(rule):
    """In a LLaVA the places of a picture are positions of the text; it generates under an edit as without a cache."""
    model, sae, (where, at) = llava(), new_sae(), RULES[rule]
    picture, text = torch.randn(1, 3, 8, 8), [BOS, 5, *[IMAGE] * 4, 7, 8]
    site = "model.language_model.layers.0"
    ids, length = torch.tensor([text]), len(text)
    with sh.steer(model, sae, {LATENT: STEP}, at=site, where=where):
        found = model.generate(
            ids, pixel_values=picture, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3
        )
    for _ in range(3):
        at_token = lambda _, p, text=tuple(text): at(p, length, text[p])  # noqa: E731
        with torch.no_grad(), edited(model.get_submodule(site), STEP * arrow(sae), at_token):
            text.append(int(model(torch.tensor([text]), pixel_values=picture).logits[0, -1].argmax()))
    assert found[0].tolist() == text


def test_the_picture_tower_of_a_multimodal_model_counts_its_own():
    """CLS and patches are positions of the tower alone, in a call and while generating."""
    model, picture = llava(), torch.randn(1, 3, 8, 8)
    ids = torch.tensor([[BOS, 5, *[IMAGE] * 4]])  # as long as the tower's positions and one more
    after = model.model.vision_tower.encoder.layers[1]
    for where, right in ((0, [0]), (sh.last, [4]), (sh.pooled, [0]), (slice(1, None), [1, 2, 3, 4])):
        for call in (
            lambda: model(ids, pixel_values=picture),
            lambda: model.generate(ids, pixel_values=picture, do_sample=False, max_new_tokens=2),
        ):
            assert places(after, call, steering(model, "model.vision_tower.encoder.layers.0", where)) == [right]


@pytest.mark.parametrize("masked", [True, False])
def test_hugging_face_clip_ends_a_text_at_its_end(masked):
    """The text tower counts up to the end of each text, with a mask or without; the other tower has all its patches."""
    model, picture = hugging_face_clip(), torch.randn(2, 3, 8, 8)
    ids = torch.tensor([[0, 5, 6, 1, 1, 1], [0, 7, 8, 9, 10, 1]])
    mask = {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])} if masked else {}
    text, visual = model.text_model.encoder.layers[1], model.vision_model.encoder.layers[1]
    both = lambda: model(input_ids=ids, pixel_values=picture, **mask)  # noqa: E731
    for where, right in (
        (sh.last, [[3], [5]]),
        (sh.pooled, [[3], [5]]),
        (sh.everywhere, [[0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]),
        ([-2], [[2], [4]]),
    ):
        site = "text_model.encoder.layers.0"
        for call in (both, lambda: model.get_text_features(input_ids=ids, **mask)):
            assert places(text, call, steering(model, site, where)) == right
    for where, right in ((sh.pooled, [[0], [0]]), (sh.everywhere, [[0, 1, 2, 3, 4]] * 2)):
        assert places(visual, both, steering(model, "vision_model.encoder.layers.0", where)) == right


class TextEncoder(nn.Module):
    """torch's own encoder, which takes (pos, batch, width) unless it is told otherwise."""

    def __init__(self, batch_first):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.batch_first = nn.Embedding(64, 32), batch_first
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids, padding=None):
        x = self.embed(ids)
        x = self.encoder(x if self.batch_first else x.transpose(0, 1), src_key_padding_mask=padding)
        return x if self.batch_first else x.transpose(0, 1)


@pytest.mark.parametrize("rows", [ROWS, [row[:3] for row in ROWS]], ids=["padded", "as many texts as words"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("rule", ["[2, -1]", "sh.last", "function", "left out"])
def test_torchs_own_encoder_takes_positions_first(rule, batch_first, rows):
    """Where an encoder sees (pos, batch, width), codes are (batch, pos) all the same, and padding is left out."""
    model, sae, (where, at) = TextEncoder(batch_first).eval(), new_sae(), RULES[rule]
    ids, mask = padded(rows, "right")
    with torch.no_grad(), sh.steer(model, sae, {LATENT: STEP}, at="encoder.layers.0", where=where) as trace:
        found = model(ids, mask == 0)
    assert trace.codes.shape == tuple(ids.shape)
    for i, row in enumerate(rows):
        place = (lambda r, p: p) if batch_first else (lambda r, p: r)
        at_token = lambda r, p, row=row, place=place: at(place(r, p), len(row), row[place(r, p)])  # noqa: E731
        with torch.no_grad(), edited(model.encoder.layers[0], STEP * arrow(sae), at_token):
            assert same(found[i, : len(row)], model(torch.tensor([row]))[0])


def test_padding_of_the_tokens_is_known_to_generate_alone():
    """Tokens padded without a mask: `generate` makes one for them, and a forward takes every column for a word."""
    host = decoder("llama")
    ids, _ = padded(ROWS, "left")
    with sh.read(host.model, host.sae, at=host.site, where=0, keep_all=True) as trace, torch.no_grad():
        host.model.generate(ids, do_sample=False, max_new_tokens=1)
        host.model(ids)
    first = [mask.int().argmax(1).tolist() for mask in (one.mask for one in trace.forwards)]
    assert first == [[int((row != PAD).int().argmax()) for row in ids], [0, 0, 0]]
