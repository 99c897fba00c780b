"""What ``measure`` reports, and that the user's calls notice nothing of it."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch.nn import functional as F

from saehooks.attachments import read, splice
from saehooks.errors import ConfigError, NeverFiredError, SiteError, WhereError, WidthError
from saehooks.evaluation import Measurement, measure
from saehooks.evaluation.logits import LogitsComparison
from saehooks.hosts import host
from saehooks.sae import SAE
from saehooks.where import everywhere, positions

LM_SITE = "blocks.1.hook_resid_post"
CLIP_SITE = "visual.blocks.1.hook_resid_post"
AFTER_FIRST = positions(slice(1, None))


def exact_sae(width: int) -> SAE:
    """An SAE that reconstructs everything: latents are the positive and the negative parts of each coordinate."""
    sae = SAE(width, 2 * width, "linear", "topk", k=width)
    with torch.no_grad():
        both = torch.cat([torch.eye(width), -torch.eye(width)])
        sae.dictionary.W_dec.copy_(both)
        sae.dictionary.W_enc.copy_(both.T)
        for name, parameter in sae.named_parameters():
            if "b_" in name:
                parameter.zero_()
    return sae


def rough_sae(width: int) -> SAE:
    torch.manual_seed(0)
    return SAE(width, 64, "linear", "topk", k=4)


def all_hooks(model: torch.nn.Module) -> list[tuple]:
    """Every registered hook, and every attribute put over a method."""
    return [
        (
            name,
            tuple(m._forward_hooks),
            tuple(m._forward_pre_hooks),
            "forward" in m.__dict__,
            "encode_image" in m.__dict__,
        )
        for name, m in model.named_modules()
    ]


@pytest.fixture
def tokens():
    return torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def images():
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------- language models


def test_calls_return_what_they_return_without_the_block(tiny_bridge, tokens):
    """Outputs are bit-identical with and without gradients, and afterwards the model carries the hooks it had."""
    clean = tiny_bridge(tokens)
    before = all_hooks(tiny_bridge)
    with measure(tiny_bridge, rough_sae(32), LM_SITE) as live:
        assert torch.equal(tiny_bridge(tokens), clean)
        with torch.no_grad():
            assert torch.equal(tiny_bridge(tokens), tiny_bridge(tokens))
        loss = tiny_bridge(tokens, return_type="loss")
    assert all_hooks(tiny_bridge) == before
    assert live.calls == 4
    loss.backward()


def test_a_perfect_sae_loses_nothing(tiny_bridge, tokens):
    """An SAE that reconstructs exactly has no CE degradation, recovers everything, and has NMSE 0."""
    with measure(tiny_bridge, exact_sae(32), LM_SITE) as live:
        tiny_bridge(tokens)
    figures = live.summary()
    assert figures["ce_degradation"] == pytest.approx(0, abs=1e-5)
    assert figures["ce_recovered"] == pytest.approx(1, abs=1e-3)
    assert figures["kl"] == pytest.approx(0, abs=1e-5)
    assert figures["nmse"] == pytest.approx(0, abs=1e-10)
    assert figures["cosine"] == pytest.approx(1)
    assert figures["shrinkage"] == pytest.approx(1)
    assert figures["n_tokens"] == 3 * 9
    assert figures["n_predictions"] == 3 * 8


def test_an_sae_of_zeros_recovers_nothing(tiny_bridge, tokens):
    """Reconstructing zeros is the zero-ablation: recovered 0, NMSE 1."""
    sae = exact_sae(32)
    with torch.no_grad():
        sae.dictionary.W_dec.zero_()
    with measure(tiny_bridge, sae, LM_SITE) as live:
        tiny_bridge(tokens)
    figures = live.summary()
    assert figures["ce_spliced"] == figures["ce_zero"] != figures["ce_clean"]
    assert figures["ce_recovered"] == 0
    assert figures["nmse"] == 1


def test_figures_agree_with_the_blocks_a_user_would_write(tiny_bridge, tokens):
    """CE clean and spliced are the model's own losses, with ``splice`` at every position but the first."""
    sae = rough_sae(32)
    with measure(tiny_bridge, sae, LM_SITE, where=AFTER_FIRST) as live:
        tiny_bridge(tokens)
    with splice(tiny_bridge, sae, at=LM_SITE, where=AFTER_FIRST) as trace, torch.no_grad():
        spliced = tiny_bridge(tokens)
    clean = tiny_bridge(tokens).detach()
    x, recons = trace.acts[:, 1:], trace.recons[:, 1:]
    figures = live.summary()
    assert figures["ce_clean"] == pytest.approx(_ce(clean, tokens), rel=1e-5)
    assert figures["ce_spliced"] == pytest.approx(_ce(spliced, tokens), rel=1e-5)
    kl = F.kl_div(spliced.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert figures["kl"] == pytest.approx(float(kl[:, :-1].mean()), rel=1e-4)
    assert figures["nmse"] == pytest.approx(float((x - recons).square().sum() / x.square().sum()), rel=1e-5)
    assert figures["l0"] == pytest.approx(float(trace.support_size[:, 1:].double().mean()))


def _ce(logits, tokens) -> float:
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


def test_calls_are_weighted_by_their_tokens(tiny_bridge, tokens):
    """Measuring in two unequal parts gives what measuring at once gives."""
    sae = rough_sae(32)
    with measure(tiny_bridge, sae, LM_SITE) as whole:
        tiny_bridge(tokens)
    with measure(tiny_bridge, sae, LM_SITE) as parts:
        tiny_bridge(tokens[:1])
        tiny_bridge(tokens[1:])
    assert parts.summary() == pytest.approx(whole.summary(), rel=1e-5)


def test_a_loss_or_nothing_may_be_asked_for(tiny_bridge, tokens):
    """Where the call gives no logits, the clean run is repeated for them: the figures are the same."""
    sae = rough_sae(32)
    results = []
    for arguments in ({}, {"return_type": "loss"}, {"return_type": None}):
        with measure(tiny_bridge, sae, LM_SITE) as live, torch.no_grad():
            tiny_bridge(tokens, **arguments)
        results.append(live.summary())
    assert results[1] == pytest.approx(results[0], rel=1e-6)
    assert results[2] == pytest.approx(results[0], rel=1e-6)


def test_padding_counts_for_nothing(tiny_hf, tokens):
    """Padded positions are neither spliced nor predicted: a padded row measures like its unpadded self."""
    sae, site = rough_sae(32), "model.layers.1"
    short = tokens[:1, :5]
    padded = torch.cat([short, torch.full((1, 4), 2)], dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 4])
    with measure(tiny_hf, sae, site) as alone:
        tiny_hf(short)
    with measure(tiny_hf, sae, site) as with_padding:
        tiny_hf(padded, attention_mask=mask)
    assert with_padding.summary() == pytest.approx(alone.summary(), rel=1e-4)
    assert alone.summary()["n_tokens"] == 5


def test_where_chooses_what_is_spliced_and_zeroed(tiny_bridge, tokens):
    """Left out, it is where the SAE was trained; ``everywhere`` takes in position 0; a rule takes what it says."""
    sae, counts = rough_sae(32), []
    for where in (everywhere, positions([2, 3]), None):
        with measure(tiny_bridge, sae, LM_SITE, where=where) as live:
            tiny_bridge(tokens)
        counts.append(live.summary()["n_tokens"])
    assert counts == [27, 6, 27]


def test_dropout_goes_on_as_without_the_block(tokens):
    """The runs in between use no random numbers of the user's."""
    model, sae = TinyDropoutModel(), rough_sae(32)
    torch.manual_seed(5)
    expected = [model(tokens), model(tokens)]
    torch.manual_seed(5)
    with measure(model, sae, "body"):
        got = [model(tokens), model(tokens)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


class TinyDropoutModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = torch.nn.Embedding(64, 32), torch.nn.Linear(32, 32)
        self.drop, self.head = torch.nn.Dropout(0.5), torch.nn.Linear(32, 64)

    def forward(self, input_ids):
        return self.head(self.drop(self.body(self.embed(input_ids))))


def test_other_blocks_end_up_with_the_clean_run(tiny_bridge, tokens):
    """A ``read`` beside ``measure`` holds the codes of the user's own call, not of the spliced run."""
    sae, later = rough_sae(32), "blocks.2.hook_resid_post"
    with read(tiny_bridge, sae, at=later) as alone:
        tiny_bridge(tokens)
    with measure(tiny_bridge, sae, LM_SITE), read(tiny_bridge, sae, at=later) as beside:
        tiny_bridge(tokens)
    assert torch.equal(beside.codes.dense(), alone.codes.dense())


def test_history_holds_one_row_for_each_call_and_stays_bounded(tiny_bridge, tokens, monkeypatch):
    """The last row is the summary; a long run is thinned, not kept whole."""
    monkeypatch.setattr(sys.modules["saehooks.evaluation.measurement"], "HISTORY", 4)
    with measure(tiny_bridge, rough_sae(32), LM_SITE) as live:
        for _ in range(4):
            tiny_bridge(tokens)
        assert live.history[-1] == {"calls": 4, **live.summary()}
        for _ in range(20):
            tiny_bridge(tokens[:1])
    assert len(live.history) <= 4
    assert [row["calls"] for row in live.history] == sorted(row["calls"] for row in live.history)


def test_each_call_can_be_followed_elsewhere(tiny_bridge, tokens):
    """on_record gets the summary as it stands after each call, numbered, as what a training hands on is."""
    sae, seen = rough_sae(32), []
    with measure(tiny_bridge, sae, LM_SITE, on_record=seen.append) as live, torch.no_grad():
        for n in (3, 2, 1):
            tiny_bridge(tokens[:n])
    assert [record["step"] for record in seen] == [1, 2, 3]
    assert seen[-1] == {"step": 3, **live.summary()}
    first = measure(tiny_bridge, sae, [tokens], LM_SITE)
    assert {name: seen[0][name] for name in first} == pytest.approx(first, nan_ok=True)
    with pytest.raises(TypeError, match="on_record"):
        measure(tiny_bridge, sae, LM_SITE, on_record="log.csv")


def test_summary_is_a_plain_dict_of_numbers(tiny_bridge, tokens):
    """It can be written as JSON."""
    with measure(tiny_bridge, rough_sae(32), LM_SITE) as live:
        tiny_bridge(tokens)
    assert all(type(value) in (int, float) for value in live.summary().values())


def test_it_prints_and_shows_itself(tiny_bridge, tokens):
    """The repr names the site, the raw three beside the ratio, and where it measured."""
    with measure(tiny_bridge, rough_sae(32), LM_SITE, where=AFTER_FIRST) as live:
        assert "nothing yet" in repr(live)
        assert "nothing yet" in live._repr_html_()
        tiny_bridge(tokens)
    for text in (repr(live), live._repr_html_()):
        for part in (LM_SITE, "sh.positions(slice(1, None))", "zero-ablated", "CE recovered", "5/50/95%", "24"):
            assert part in text


def test_the_panel_follows_the_calls(tiny_bridge, tokens, monkeypatch):
    """``live=True`` draws the panel; without a terminal nothing is drawn unasked."""
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    with measure(tiny_bridge, rough_sae(32), LM_SITE):
        tiny_bridge(tokens)
    assert out.getvalue() == ""
    with measure(tiny_bridge, rough_sae(32), LM_SITE, live=True):
        tiny_bridge(tokens)
    assert "measure · 1 calls" in out.getvalue()


# ------------------------------------------------------------------------ CLIP


def test_clip_embeddings_are_compared_by_cosine(tiny_clip, images):
    """The figure is the mean cosine between clean and spliced embeddings, and the call returns the clean one."""
    sae = rough_sae(32)
    with torch.no_grad():
        clean = tiny_clip.encode_image(images)
        with splice(tiny_clip, sae, at=CLIP_SITE):
            spliced = tiny_clip.encode_image(images)
        before = all_hooks(tiny_clip)
        with measure(tiny_clip, sae, CLIP_SITE) as live:
            assert torch.equal(tiny_clip.encode_image(images[:2]), tiny_clip.encode_image(images[:2]))
            tiny_clip.encode_image(images[2:], normalize=True)
    assert all_hooks(tiny_clip) == before
    with measure(tiny_clip, sae, CLIP_SITE) as live, torch.no_grad():
        assert torch.equal(tiny_clip.encode_image(images), clean)
    assert live.summary()["cos_spliced"] == pytest.approx(float(F.cosine_similarity(clean, spliced).mean()), abs=1e-5)
    assert live.summary()["n_tokens"] == 5 * 17
    assert live.summary()["n_images"] == 5


def test_clip_accuracy_by_prompts_and_labels(tiny_clip, images):
    """Zero-shot accuracy counts the images whose nearest prompt is their label, clean and spliced."""
    sae, classes = rough_sae(32), F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(3)), dim=-1)
    with torch.no_grad():
        clean = (tiny_clip.encode_image(images) @ classes.T).argmax(-1)
        with splice(tiny_clip, sae, at=CLIP_SITE):
            spliced = (tiny_clip.encode_image(images) @ classes.T).argmax(-1)
    labels = clean.clone()
    labels[0] = (labels[0] + 1) % 4
    for given in (labels, None):
        with measure(tiny_clip, sae, CLIP_SITE, prompts=classes, labels=given) as live:
            for part in (slice(0, 2), slice(2, 5)):
                if given is None:
                    live.labels = labels[part]
                tiny_clip.encode_image(images[part])
        assert live.summary()["acc_clean"] == pytest.approx(0.8)
        assert live.summary()["acc_spliced"] == pytest.approx(float((spliced == labels).double().mean()))


def test_clip_text_tower(tiny_clip):
    """The text tower is measured by ``encode_text``, up to the end of each text."""
    text = torch.tensor([[60, 5, 6, 63, 0, 0, 0, 0], [60, 7, 8, 9, 10, 11, 63, 0]])
    with measure(tiny_clip, rough_sae(24), "text.blocks.0.hook_resid_post") as live:
        clean = tiny_clip.encode_text(text)
    assert torch.equal(clean, tiny_clip.encode_text(text))
    assert live.summary()["n_texts"] == 2
    assert live.summary()["n_tokens"] == 4 + 7


def test_prompts_as_text_and_as_groups(tinyclip):
    """Prompts may be text, and several prompts of a class are averaged."""
    from saehooks.evaluation.embeddings import class_embeddings

    single = class_embeddings(tinyclip, ["a photo of a cat.", "a photo of a dog."])
    grouped = class_embeddings(tinyclip, [["a photo of a cat.", "a photo of a cat."], ["a photo of a dog."]])
    assert single.shape == (2, 128)
    assert torch.allclose(single, grouped, atol=1e-6)


# ------------------------------------------------------------------- bad input


def test_a_block_without_a_call_is_an_error(tiny_bridge, tiny_clip, images):
    """Leaving without a measured call says what to call; so does asking for a summary too early."""
    with pytest.raises(NeverFiredError, match=r"call model\(tokens\)"), measure(tiny_bridge, rough_sae(32), LM_SITE):
        pass
    with pytest.raises(NeverFiredError, match="visual tower"), measure(tiny_clip, rough_sae(32), CLIP_SITE):
        tiny_clip.encode_text(torch.zeros(1, 8, dtype=torch.long))
    with measure(tiny_bridge, rough_sae(32), LM_SITE) as live:
        with pytest.raises(NeverFiredError, match="yet"):
            live.summary()
        tiny_bridge(torch.tensor([[3, 4]]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(torch.zeros(2, 1, dtype=torch.long)), NeverFiredError, "at least 2 tokens"),
        (lambda m: m(torch.zeros(2, 5, dtype=torch.long), stop_at_layer=2), ConfigError, "stop_at_layer"),
        (lambda m: m(torch.zeros(0, 5, dtype=torch.long)), ConfigError, "empty batch"),
    ],
)
def test_calls_that_cannot_be_measured_are_refused(tiny_bridge, call, error, message):
    """The error comes out of the call, and the hooks are gone."""
    tiny_bridge(torch.zeros(1, 2, dtype=torch.long))  # a bridge adds hooks of its own at its first forward
    before = all_hooks(tiny_bridge)
    with pytest.raises(error, match=message), measure(tiny_bridge, rough_sae(32), LM_SITE):
        call(tiny_bridge)
    assert all_hooks(tiny_bridge) == before


def test_generating_inside_the_block_is_refused(tiny_hf):
    """A KV cache does not survive being run three times: say so, rather than measure nonsense."""
    with pytest.raises(ConfigError, match="KV cache"), measure(tiny_hf, rough_sae(32), "model.layers.1"):
        tiny_hf.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(
    ("sae", "options", "error", "message"),
    [
        (rough_sae(32), {}, SiteError, "at="),
        (rough_sae(32), {"at": "blocks.1.resid_post"}, SiteError, "did you mean"),
        (rough_sae(16), {"at": LM_SITE}, WidthError, "d_in=16.*32 wide"),
        (rough_sae(32), {"at": LM_SITE, "prompts": ["a"]}, ConfigError, "CLIP"),
        (rough_sae(32), {"at": LM_SITE, "where": "first"}, WhereError, "where='first'"),
    ],
)
def test_what_cannot_work_is_refused_on_entering(tiny_bridge, sae, options, error, message):
    """Wrong site, width or option: an error before any hook is registered."""
    before = all_hooks(tiny_bridge)
    with pytest.raises(error, match=message), measure(tiny_bridge, sae, **options):
        pytest.fail("the block was entered")
    assert all_hooks(tiny_bridge) == before


def test_labels_must_be_there_and_fit(tiny_clip, images):
    """Missing labels, labels of another number, out of range, or without prompts: each is named."""
    classes, sae = torch.randn(4, 16), rough_sae(32)
    with pytest.raises(ConfigError, match=r"live\.labels"), measure(tiny_clip, sae, CLIP_SITE, prompts=classes):
        tiny_clip.encode_image(images)
    for labels, message in (([0, 1], "5 images"), ([0, 1, 2, 3, 4], r"0 \.\. 3")):
        with measure(tiny_clip, sae, CLIP_SITE, prompts=classes) as live:
            live.labels = labels
            with pytest.raises(ConfigError, match=message):
                tiny_clip.encode_image(images)
            live.labels = [0] * 5
            tiny_clip.encode_image(images)
    with pytest.raises(ConfigError, match="prompts="), measure(tiny_clip, sae, CLIP_SITE, labels=[0]):
        pytest.fail("the block was entered")


def test_labels_are_used_once(tiny_clip, images):
    """The labels of one call are never taken for those of the next."""
    with measure(tiny_clip, rough_sae(32), CLIP_SITE, prompts=torch.randn(4, 16)) as live:
        live.labels = torch.zeros(5, dtype=torch.long)
        tiny_clip.encode_image(images)
        with pytest.raises(ConfigError, match=r"live\.labels"):
            tiny_clip.encode_image(images)


def test_a_failing_call_leaves_figures_and_hooks_as_they_were(tiny_bridge, tokens):
    """An exception of the model passes through; the call does not count."""
    tiny_bridge(tokens)
    before = all_hooks(tiny_bridge)
    with measure(tiny_bridge, rough_sae(32), LM_SITE) as live:
        tiny_bridge(tokens)
        with pytest.raises(IndexError):
            tiny_bridge(torch.full((1, 4), 999))
    assert live.calls == 1
    assert all_hooks(tiny_bridge) == before


def test_labels_belong_to_images(tiny_bridge, tokens):
    """Labels for a language model are refused."""
    with measure(tiny_bridge, rough_sae(32), LM_SITE) as live:
        assert isinstance(live, Measurement)
        assert live.labels is None
        with pytest.raises(ConfigError, match="images"):
            live.labels = [1]
        tiny_bridge(tokens)


def test_logits_are_found_in_every_kind_of_output(tiny_bridge):
    """A tensor, a tuple with a loss before the logits, an object with logits; not a loss."""
    comparison, logits = LogitsComparison(host(tiny_bridge)), torch.zeros(2, 3, 4)
    assert comparison.compared(logits) is logits
    assert comparison.compared((torch.tensor(1.0), logits)) is logits
    assert comparison.compared(type("Output", (), {"logits": logits})()) is logits
    assert comparison.compared(torch.tensor(1.0)) is None
    assert comparison.compared(None) is None
