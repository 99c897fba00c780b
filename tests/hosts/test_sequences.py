"""What is known of the positions of a forward: caches that are continued, in any order, and calls of every kind."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from saehooks.attachments import read, splice, steer
from saehooks.errors import WhereError
from saehooks.hosts import host
from saehooks.hosts.calls import read_call
from saehooks.hosts.sequences import SequenceWatch
from saehooks.sae import SAE

transformers = pytest.importorskip("transformers")
hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

SITE = "model.layers.1"


# ------------------------------------------------- programs of forwards on several caches

STEPS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 3), st.sampled_from(["mask", "no mask", "new", "crop", "interrupted"])),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(steps=STEPS, left=st.lists(st.integers(0, 2), min_size=3, max_size=3), by_parts=st.booleans())
def test_positions_follow_each_cache(watched_llama, steps, left, by_parts):
    """Forwards on three caches, in any order and of any length, each count on from their own, padding left out."""
    model, watched = watched_llama
    call = model.model if by_parts else model
    real: dict[int, torch.Tensor] = {}  # cache -> (2, columns so far)
    caches: dict[int, object] = {}
    prompts: dict[int, int] = {}
    with watched(model, SITE) as seen, torch.no_grad():
        for which, columns, kind in steps:
            fresh = which not in caches or kind == "new"
            if fresh:
                caches[which], real[which] = transformers.DynamicCache(config=model.config), torch.zeros(2, 0).bool()
            if kind == "crop" and real[which].shape[1] > 3:
                caches[which].crop(-1)
                real[which] = real[which][:, :-1]
                prompts[which] = min(prompts[which], real[which].shape[1])
            start = real[which].shape[1]
            now = torch.ones(2, columns).bool()
            if not start:  # the second text is shorter: padded on the left
                now[1, : min(left[which], columns - 1)] = False
            real[which] = torch.cat([real[which], now], 1)
            if columns > 1 or not start:
                prompts[which] = real[which].shape[1]
            options = {} if kind == "no mask" and start else {"attention_mask": real[which].long()}
            if kind == "interrupted":
                handle = model.model.layers[0].register_forward_hook(_interrupt)
                with pytest.raises(KeyboardInterrupt):
                    call(torch.full((2, 3), 9))
                handle.remove()
            seen.clear()
            call(torch.randint(3, 60, (2, columns)), past_key_values=caches[which], use_cache=True, **options)
            assert len(seen) == 1
            counted = (real[which].cumsum(1) - 1).masked_fill(~real[which], -1)[:, start:]
            assert seen[0].start == start
            assert seen[0].place.expand(2, columns).tolist() == counted.tolist()
            length = real[which][:, : prompts[which]].sum(1)
            found = torch.as_tensor(seen[0].length).reshape(-1)
            assert found.expand(2).tolist() == length.tolist()


def _interrupt(*_):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(4)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=128, **size)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def watched_llama(llama):
    from contextlib import contextmanager

    @contextmanager
    def watched(model, name):
        source, seen = host(model), []
        watch = SequenceWatch(source)
        site = source.site(name)
        with watch.watching([(site, lambda acts: seen.append(watch.look(site, acts)))]):
            yield seen

    return llama, watched


# --------------------------------------------------------------------- single cases

IDS = torch.ones(2, 5).long()


def test_a_cache_without_a_length_that_was_begun_elsewhere(watched):
    """Where such a cache comes from outside the block, a rule that needs positions is refused, and others are not."""
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    model, sae = transformers.MambaForCausalLM(config).eval(), SAE(32, 96)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache_params
        with (
            pytest.raises(WhereError, match="begin cannot be known"),
            steer(model, sae, {1: 1.0}, at="backbone.layers.0", where=0),
        ):
            model(ids[:, :1], cache_params=cache, use_cache=True)
        with read(model, sae, at="backbone.layers.0") as trace:
            model(ids[:, :1], cache_params=cache, use_cache=True)
    assert (trace.start, trace.mask) == (None, None)


class Mixture(nn.Module):
    """Experts that each see some of the words, as rows without an order."""

    def __init__(self):
        super().__init__()
        self.embed, self.expert = nn.Embedding(64, 8), nn.Linear(8, 8)

    def forward(self, ids):
        x = self.embed(ids)
        chosen = ids % 2 == 0
        return x.masked_scatter(chosen[..., None], self.expert(x[chosen]))


def test_rows_without_an_order_have_no_positions():
    """Where a layer sees some words of a batch, positions are refused, and everywhere means all that it sees."""
    model, sae = Mixture(), SAE(8, 16, "linear", "relu")
    ids = torch.tensor([[2, 3, 4], [5, 6, 8]])
    with pytest.raises(WhereError, match="are not those of the text"), splice(model, sae, at="expert", where=0):
        model(ids)
    with read(model, sae, at="expert") as trace:
        model(ids)
    assert trace.codes.shape == (4, 1)


def test_tokens_without_a_batch_axis(watched):
    """A text given as (pos,) has its positions."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    with watched(model, "1") as seen:
        model(torch.tensor([5, 6, 7]))
    assert (seen[0].shape, seen[0].place.tolist(), seen[0].tokens.tolist()) == ((1, 3), [0, 1, 2], [[5, 6, 7]])


@pytest.mark.parametrize(
    ("names", "args", "kwargs", "kind", "shape"),
    [
        (["input_ids"], (torch.ones(2, 5).long(),), {}, "text", (2, 5)),
        ([], (torch.ones(2, 5).long(), torch.ones(2, 5)), {}, "text", (2, 5)),
        (["x"], (torch.ones(2, 5, 8),), {}, "hidden", (2, 5)),
        ([], (), {"inputs_embeds": torch.ones(2, 5, 8)}, "text", (2, 5)),
        ([], (), {"position_ids": torch.ones(2, 5).long(), "idx": torch.ones(2, 3).long()}, "text", (2, 3)),
        (["hidden", "top_k_index"], (torch.ones(7, 8), torch.ones(7, 2).long()), {}, "nothing", None),
        (["image"], (torch.ones(2, 3, 8, 8),), {}, "raw", None),
        ([], (), {"input_features": torch.ones(2, 8, 20)}, "raw", None),
        ([], (), {"input_ids": torch.ones(2, 5).long(), "pixel_values": torch.ones(2, 3, 8, 8)}, "text", (2, 5)),
        (
            [],
            (),
            {"input_ids": torch.ones(2, 5).long(), "decoder_input_ids": torch.ones(2, 3).long()},
            "two texts",
            None,
        ),
        ([], (), {"encoder_outputs": (1,), "decoder_input_ids": torch.ones(2, 3).long()}, "text", (2, 3)),
        ([], (), {"attention_mask": torch.ones(2, 5).long()}, "nothing", None),
    ],
)
def test_what_a_call_is_given(names, args, kwargs, kind, shape):
    """Tokens, embeddings, pictures and texts of two stacks are told apart by what they are."""
    given = read_call(nn.Identity(), names, args, kwargs)
    assert (given.kind, given.shape) == (kind, shape)


def test_a_call_that_failed_is_forgotten(llama, watched):
    """After an error inside a call, the next call of a part knows its own text alone."""
    handle = llama.model.layers[0].register_forward_hook(_interrupt)
    with watched(llama, SITE) as seen:
        with pytest.raises(KeyboardInterrupt):
            llama(torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[0, 1, 1]]))
        handle.remove()
        llama.model(torch.tensor([[4, 5, 6]]))
        llama.model.layers[1].mlp(torch.ones(1, 3, 32))
    assert len(seen) == 1
    assert (seen[0].tokens.tolist(), seen[0].real) == ([[4, 5, 6]], None)


def test_watching_costs_next_to_nothing(llama):
    """A forward of 64 tokens through 12 blocks takes at most 2% longer, whatever the number of blocks.

    The median of 48 forwards; on a machine that is busy with other things, of up to five times 48 one after the other.
    """
    config = transformers.GPT2Config(vocab_size=500, n_embd=384, n_layer=12, n_head=6, n_positions=64)
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.randint(0, 500, (1, 64))
    source = host(model)
    site, watch, spent = source.site("transformer.h.6"), SequenceWatch(source), []

    def timed(function):
        def around(*args, **kwargs):
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent.append(time.thread_time() - started)

        return around

    watch._begin, watch._end, watch.look = timed(watch._begin), timed(watch._end), timed(watch.look)
    threads, placed, medians = torch.get_num_threads(), [], []
    torch.set_num_threads(1)
    with torch.no_grad(), watch.watching([(site, lambda acts: placed.append(watch.look(site, acts).place))]):
        while not medians or (len(medians) < 5 and medians[-1] >= 0.02):
            ratios = []
            for _ in range(48):  # long enough that what else the machine does for a moment is not most of it
                spent.clear()
                started = time.thread_time()
                model(ids)
                whole = time.thread_time() - started
                ratios.append(sum(spent) / (whole - sum(spent)))
                assert len(spent) <= 6  # the model, its stack, the block: two calls each at most, whatever the depth
            medians.append(sorted(ratios)[len(ratios) // 2])
    torch.set_num_threads(threads)
    assert medians[-1] < 0.02, medians
