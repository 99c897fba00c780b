"""Activations out of a hooked model, and the buffer that mixes them."""

import pytest
import torch

import saehooks as sh
from saehooks.errors import ConfigError, NotFiniteError, SiteError, WidthError
from saehooks.hosts import host
from saehooks.streams import ShuffleBuffer, TokenBatches, harvest, read_text
from saehooks.where import everywhere

SITE = "blocks.1.hook_resid_post"


def hooks_of(model):
    return [(name, list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()]


def test_harvest_gives_the_rows_that_run_with_cache_gives(tiny_bridge):
    """Harvested rows are the site's activations at every position but the first, in order, bit for bit."""
    tokens = torch.randint(0, 64, (3, 9))
    name = "blocks.1.hook_out"
    with torch.no_grad():
        _, cache = tiny_bridge.run_with_cache(tokens, names_filter=[name])
    rows = list(harvest(tiny_bridge, [tokens], SITE))
    assert len(rows) == 1
    assert torch.equal(rows[0], cache[name][:, 1:].reshape(-1, 32))
    assert torch.equal(next(harvest(tiny_bridge, [tokens], SITE, where=everywhere)), cache[name].reshape(-1, 32))


def test_harvest_leaves_no_hook_between_batches(tiny_bridge):
    """While a caller holds a harvest half-way, the model is as it was: complete outputs, no hooks."""
    tokens = torch.randint(0, 64, (2, 6))
    with torch.no_grad():
        before = tiny_bridge(tokens)
        hooks = hooks_of(tiny_bridge)
        stream = harvest(tiny_bridge, [tokens, tokens], SITE)
        next(stream)
        assert hooks_of(tiny_bridge) == hooks
        assert torch.equal(tiny_bridge(tokens), before)


def test_harvest_runs_no_layer_after_the_site(tiny_bridge):
    """Layers behind the site are never entered."""
    entered = []
    tiny_bridge.blocks[2].register_forward_pre_hook(lambda *_: entered.append(1))
    list(harvest(tiny_bridge, [torch.randint(0, 64, (2, 6))], SITE))
    assert entered == []


def test_harvest_of_images_gives_patches(tiny_clip):
    """For a CLIP, rows are CLS and the patches of each image."""
    rows = next(harvest(tiny_clip, [torch.randn(2, 3, 16, 16)], "visual.blocks.1.hook_resid_post"))
    assert rows.shape == (2 * 17, 32)


def test_batches_are_moved_to_the_model(tiny_hf):
    """Tensors, also those in dicts and pairs, follow the model to its device; what is no tensor stays."""
    source = host(tiny_hf.to("meta"))
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    found = source.to_device({"input_ids": tokens, "pair": (tokens, "text"), "n": 3})
    assert found["input_ids"].device == found["pair"][0].device == source.device == torch.device("meta")
    assert found["pair"][1:] == ("text",)
    assert found["n"] == 3
    assert tokens.device.type == "cpu"


def test_harvest_names_an_unknown_site(tiny_bridge):
    """A site that does not exist is an error that suggests one that does."""
    with pytest.raises(SiteError, match="hook_resid_post"):
        next(harvest(tiny_bridge, [torch.zeros(1, 4, dtype=torch.long)], "blocks.1.resid_post"))


def served(buffer, rows, step):
    batches = []
    for part in rows.split(step):
        batches += list(buffer.add(part))
    return batches + list(buffer.drain())


@pytest.mark.parametrize("step", [1, 7, 64, 500])
def test_buffer_serves_every_row_exactly_once(step):
    """With one pass, what comes out is what went in: each row once, less a last part smaller than a batch."""
    rows = torch.arange(640.0)[:, None].expand(640, 3)
    out = torch.cat(served(ShuffleBuffer(100, 3, 16), rows, step))[:, 0]
    assert len(out) == 640
    assert torch.equal(out.sort().values, rows[:, 0])


def test_buffer_mixes_rows_from_far_apart():
    """A batch holds rows that came in far apart, not neighbours."""
    batches = served(ShuffleBuffer(512, 1, 32), torch.arange(4096.0)[:, None], 64)
    spreads = torch.tensor([float(b.max() - b.min()) for b in batches])
    assert spreads.median() > 300


def test_buffer_uses_rows_as_often_as_asked():
    """With four passes, a row is served about four times."""
    out = torch.cat(served(ShuffleBuffer(256, 1, 32, passes=4), torch.arange(2048.0)[:, None], 64))
    counts = torch.bincount(out[:, 0].long(), minlength=2048)
    assert 3.5 < counts.float().mean() <= 4.1
    assert (counts > 0).float().mean() > 0.95


def test_buffer_state_continues_bit_for_bit():
    """A buffer restored from a state serves the batches that the first one would have served."""
    rows = torch.randn(900, 4)
    one, two = ShuffleBuffer(128, 4, 16, seed=3), ShuffleBuffer(128, 4, 16, seed=8)
    list(one.add(rows[:500]))
    two.restore(one.state())
    after = [torch.cat([*b.add(rows[500:]), *b.drain()]) for b in (one, two)]
    assert torch.equal(*after)


def test_buffer_left_between_two_batches_continues_bit_for_bit():
    """Stopped before any batch of an ``add`` or of the drain, and restored, it serves the rest of the batches."""

    def new(seed):
        return ShuffleBuffer(128, 4, 16, passes=2, seed=seed)

    def all_of(buffer, parts):
        while parts:
            yield from buffer.add(parts[0])
            parts.pop(0)
        yield from buffer.drain()

    rows = torch.randn(700, 4).split(300)
    whole = list(all_of(new(3), [*rows]))
    for stop in range(0, len(whole), 5):
        one, two, left = new(3), new(8), [*rows]
        one.before_batch = ([None] * stop).pop  # an IndexError after so many batches
        with pytest.raises(IndexError):
            list(all_of(one, left))
        two.restore(one.state())
        after = list(all_of(two, left))
        assert torch.equal(torch.cat(after), torch.cat(whole[stop:])), stop


def test_buffer_refuses_what_it_cannot_hold():
    """Wrong widths, NaN and impossible sizes are errors, and nothing bad gets in."""
    buffer = ShuffleBuffer(64, 4, 16)
    with pytest.raises(WidthError, match="width 4"):
        list(buffer.add(torch.randn(3, 5)))
    with pytest.raises(NotFiniteError, match="1 of 3"):
        list(buffer.add(torch.tensor([[0.0] * 4, [float("nan")] * 4, [1.0] * 4])))
    assert buffer.filled == 0
    assert list(buffer.add(torch.zeros(0, 4))) == []
    with pytest.raises(ConfigError, match="two batches"):
        ShuffleBuffer(16, 4, 16)


def test_token_batches_repeat_themselves_and_start_with_bos(tiny_tokenizer):
    """Sequences are full, begin with BOS, hold the text in order, and come again on the next iteration."""
    text = " ".join(f"w{i % 50}" for i in range(100))
    batches = TokenBatches(tiny_tokenizer, text, context=11, batch_size=4)
    first = torch.cat(list(batches))
    assert len(batches) == 3
    assert first.shape == (10, 11)
    assert (first[:, 0] == 0).all()
    assert first[:, 1:].reshape(-1).tolist() == [3 + i % 50 for i in range(100)]
    assert torch.equal(torch.cat(list(batches)), first)


def test_token_batches_refuse_too_little_text(tiny_tokenizer, tmp_path):
    """Text shorter than one sequence, or a missing file, is an error that says so."""
    with pytest.raises(ConfigError, match="too few"):
        TokenBatches(tiny_tokenizer, "w1 w2", context=16)
    with pytest.raises(ConfigError, match=r"nothing\.txt"):
        read_text([tmp_path / "nothing.txt"])


def test_a_forward_of_no_sequences_gives_no_rows(tiny_hf):
    """An empty batch passes through the harvest as zero rows, and through an SAE."""
    embed = tiny_hf.model.embed_tokens
    rows = next(harvest(torch.nn.Sequential(embed), [torch.zeros(0, 5, dtype=torch.long)], "0"))
    assert rows.shape == (0, 32)
    assert sh.SAE(d_in=32, d_sae=64)(rows).recons.shape == (0, 32)
