"""The promises of every attachment, on TransformerLens 2.18 and 3.9; run by .ci/legacy_env.

The tests are those of tests/test_promises.py, over the hosts that these releases have.
"""

from __future__ import annotations

import inspect

import pytest
import test_promises
import torch
from test_promises import D_SAE, PROMPT, RULES, TOKENS, Host, state

from saehooks.attachments import read, splice, steer
from saehooks.sae import SAE

lens = pytest.importorskip("transformer_lens")
try:
    lens.HookedTransformer  # noqa: B018 - TransformerLens 4 answers with an ImportError
except (AttributeError, ImportError):
    pytest.skip("TransformerLens 4 has no HookedTransformer", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SITE = "blocks.1.hook_resid_post"

globals().update(
    (name, test)
    for name, test in vars(test_promises).items()
    if name.startswith("test_") and "host" in inspect.signature(test).parameters
)


def model_of(request, family):
    if family == "bridge":
        return request.getfixturevalue("tiny_hf_bridge")
    config = lens.HookedTransformerConfig(
        d_model=32, n_layers=3, n_heads=4, d_head=8, n_ctx=64, d_vocab=64, d_mlp=48, act_fn="gelu", seed=0
    )
    return lens.HookedTransformer(config, tokenizer=request.getfixturevalue("tiny_tokenizer")).eval()


@pytest.fixture(params=["hooked", "hooked heads", "bridge"])
def host(request) -> Host:
    model = model_of(request, request.param.split()[0])
    site = "blocks.1.attn.hook_z" if "heads" in request.param else SITE
    torch.manual_seed(1)
    sae = SAE(d_in=32, d_sae=D_SAE, hook_name=site)
    model(TOKENS)
    return Host(model, sae, site, "blocks.1.hook_out" if request.param == "bridge" else None, lambda m: m(TOKENS))


@pytest.fixture(params=["hooked", "bridge"])
def model(request):
    return model_of(request, request.param)


def test_1_reset_hooks_inside_is_survived(model):
    """``model.reset_hooks()`` in the block leaves the attachment, and the block leaves nothing."""
    model(TOKENS)
    before = state(model)
    with splice(model, SAE(d_in=32, d_sae=D_SAE), at=SITE) as trace:
        spliced = model(TOKENS)
        model.reset_hooks()
        assert torch.equal(model(TOKENS), spliced)
        assert trace.calls == 2
    assert state(model) == before


def test_2_bit_identical_with_hooks_of_the_user(model):
    """A permanent hook on the site, and ``run_with_hooks`` and ``run_with_cache`` inside the block, act as before."""
    model.hook_dict[SITE].add_hook(lambda acts, hook: acts * 1.5, is_permanent=True)
    model(TOKENS)
    mine = (SITE, lambda acts, hook: acts - 0.25)
    clean, hooked = model(TOKENS), model.run_with_hooks(TOKENS, fwd_hooks=[mine])
    with read(model, SAE(d_in=32, d_sae=D_SAE), at=SITE) as trace:
        assert torch.equal(model(TOKENS), clean)
        assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=[mine]), hooked)
        assert torch.equal(model.run_with_cache(TOKENS)[0], clean)
    assert trace.calls == 3
    assert torch.equal(model(TOKENS), clean)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_6_the_same_tokens_with_and_without_kv_cache(model, rule):
    """Steering at absolute positions generates one text, with the cache and without."""
    torch.manual_seed(1)
    sae, texts = SAE(d_in=32, d_sae=D_SAE), []
    options = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}
    for on in (True, False):
        with steer(model, sae, {7: 3.0, 30: -3.0}, at=SITE, where=rule, keep_all=True) as trace:
            texts.append(model.generate(PROMPT, use_past_kv_cache=on, **options))
        widths = [forward.codes.shape[1] for forward in trace.forwards]
        assert widths == ([6, 1, 1, 1, 1, 1] if on else [6, 7, 8, 9, 10, 11])
    assert torch.equal(*texts)
