"""Promises on real models: SmolLM2 out of its wheel, and the small CLIP."""

from __future__ import annotations

import pytest
import torch
from test_promises import D_SAE, Host, all_verbs, nothing_edited, state

from saehooks.attachments import steer
from saehooks.demo.models import smollm2
from saehooks.errors import FormatError
from saehooks.hosts import host as host_of
from saehooks.sae import SAE
from saehooks.where import last

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def real_lm():
    """SmolLM2-135M-Instruct as a bridge, out of its wheel."""
    pytest.importorskip("transformer_lens.model_bridge")
    try:
        return smollm2()[0]
    except FormatError as error:
        pytest.skip(str(error))


@torch.no_grad()
def test_2_bit_identity_on_smollm2(real_lm):
    """On a real language model: reading and empty edits change no bit, an edit at a position nothing before it."""
    site = "blocks.15.hook_resid_post"
    tokens = real_lm.to_tokens("The licenses for most software are designed to take away your freedom.")
    host = Host(real_lm, SAE(d_in=576, d_sae=512, hook_name=site), site, None, lambda m: m(tokens))
    clean = real_lm(tokens)
    before = state(real_lm)
    for name, block in nothing_edited(host).items():
        with block:
            assert torch.equal(real_lm(tokens), clean), name
    with steer(real_lm, host.sae, {3: 50.0}, where=[5]):
        steered = real_lm(tokens)
    assert torch.equal(steered[:, :5], clean[:, :5])
    assert not torch.equal(steered[:, 5:], clean[:, 5:])
    assert state(real_lm) == before


@pytest.mark.bridge_cache
@torch.no_grad()
def test_6_generation_with_and_without_kv_cache_on_smollm2(real_lm):
    """A real model, steered from the prompt's last position on, writes one text with the cache and without."""
    torch.manual_seed(0)
    sae = SAE(d_in=576, d_sae=512, hook_name="blocks.15.hook_resid_post")
    tokens, texts = real_lm.to_tokens("Once upon a time"), []
    for cache in (True, False, None):
        with steer(real_lm, sae, {3: 0.0 if cache is None else 0.4}, where=last):
            texts.append(real_lm.generate(tokens, max_new_tokens=5, do_sample=False, use_past_kv_cache=bool(cache)))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("site", ["visual.blocks.4.hook_resid_post", "text.blocks.0.hook_resid_post"])
def test_1_and_2_on_the_small_clip(tinyclip, site):
    """On a real CLIP, in either tower: bit-identity, and every verb leaves it as it was."""
    photos = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    words = torch.randint(1, 60, (2, tinyclip.context_length), generator=torch.Generator().manual_seed(0))
    call = (lambda m: m.encode_image(photos)) if "visual" in site else (lambda m: m.encode_text(words))
    sae = SAE(d_in=host_of(tinyclip).site(site).width, d_sae=D_SAE, hook_name=site)
    host = Host(tinyclip, sae, site, None, call)
    with torch.no_grad():
        clean, before = call(tinyclip), state(tinyclip)
        for name, block in nothing_edited(host).items():
            with block:
                assert torch.equal(call(tinyclip), clean), name
        for name, block in all_verbs(host).items():
            with block:
                assert not torch.equal(call(tinyclip), clean), name
            assert state(tinyclip) == before, name
