"""Multimodal language models: the tokens of a text and the places of a picture are positions of one stack."""

from __future__ import annotations

import pytest
import torch

import saehooks as sh
from saehooks.where import tokens as at_tokens

transformers = pytest.importorskip("transformers")

IMAGE, SITE = 60, "model.language_model.layers.0"


@pytest.fixture
def llava(tiny_decoder):
    """A LLaVA: a picture of 8 x 8 becomes four tokens of a Llama of width 32."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    text = transformers.LlamaConfig(**tiny_decoder)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1, image_seq_length=4
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


TEXT = torch.tensor([[0, 5, *[IMAGE] * 4, 6, 7]])
RULES = {
    "0": (0, lambda p: p == 0),
    "[2, -1]": ([2, -1], lambda p: p in (2, 7)),
    "last": (sh.last, lambda p: p >= 7),
    "not special": (sh.not_special([0, IMAGE]), lambda p: p in (1, 6) or p >= 7),
    "picture": (sh.tokens(IMAGE), lambda p: 2 <= p <= 5),
    "no picture": (~sh.tokens([IMAGE]), lambda p: not 2 <= p <= 5),
    "function": (lambda tokens, codes: tokens == IMAGE, lambda p: 2 <= p <= 5),
}


def written(model, pictures, **how):
    found = model.generate(
        input_ids=TEXT,
        pixel_values=pictures,
        max_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **how,
    )
    return torch.stack(found.logits, 1)


@pytest.mark.parametrize("rule", RULES)
def test_positions_of_text_and_picture_are_one_sequence(llava, rule):
    """Steering at tokens of the text or of the picture is what a plain hook does, with and without a cache."""
    where, at = RULES[rule]
    pictures, sae = torch.randn(1, 3, 8, 8), sh.SAE(32, 96, "linear", "relu").eval()
    step = 6.0 * sae.directions(7)[0].detach()

    def hook(module, args, output):
        first = (output[0] if isinstance(output, tuple) else output).clone()
        for p in filter(at, range(first.shape[1])):
            first[:, p] += step
        return (first, *output[1:]) if isinstance(output, tuple) else first

    handle = llava.get_submodule(SITE).register_forward_hook(hook)
    right = written(llava, pictures, use_cache=False)
    handle.remove()
    for cached in (True, False):
        with sh.steer(llava, sae, {7: 6.0}, at=SITE, where=where):
            torch.testing.assert_close(written(llava, pictures, use_cache=cached), right, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(written(llava, pictures), right)


def test_the_vision_tower_has_positions_of_its_own(llava):
    """Inside the vision tower CLS and patches are positions, and no tokens; nothing is left out there."""
    names = sh.sites(llava).names
    site = next(name for name in names if name.endswith("layers.1") and "vision" in name)
    sae, pictures = sh.SAE(16, 32, "linear", "relu").eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad(), sh.steer(llava, sae, {3: 2.0}, at=site, where=[0, -1]) as trace:
        llava(input_ids=TEXT, pixel_values=pictures)
    assert trace.mask.tolist() == [[True, False, False, False, True]]
    assert trace.tokens is None
    with torch.no_grad(), sh.attach(llava, {site: sae, SITE: sh.SAE(32, 64)}, where=sh.last) as traces:
        llava(input_ids=TEXT, pixel_values=pictures)
    assert [trace.mask.nonzero()[:, 1].tolist() for trace in traces.values()] == [[4], [7]]
    assert torch.equal(traces[SITE].tokens, TEXT)


def test_measuring_a_multimodal_model(llava):
    """Its cross-entropy is counted over the next tokens of the text, as the model's logits give it."""
    sae, pictures = sh.SAE(32, 96, "linear", "relu").eval(), torch.randn(1, 3, 8, 8)
    with sh.measure(llava, sae, at=SITE, live=False) as live:
        llava(input_ids=TEXT, pixel_values=pictures)
    with torch.no_grad():
        logits = llava(input_ids=TEXT, pixel_values=pictures).logits
    right = torch.nn.functional.cross_entropy(logits[0, :-1], TEXT[0, 1:])
    assert float(live.summary()["ce_clean"]) == pytest.approx(float(right), rel=1e-4)


def test_tokens_are_ids():
    """A rule for tokens takes ids, one or several; it is the opposite of leaving them out."""
    assert repr(at_tokens(IMAGE)) == "~sh.not_special([60])"
    assert repr(~at_tokens([IMAGE, 0])) == "sh.not_special([0, 60])"
    with pytest.raises(ValueError, match="token ids, whole numbers; got 'x'"):
        at_tokens("x")
