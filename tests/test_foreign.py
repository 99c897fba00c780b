"""Warnings about SAEs that were trained elsewhere."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch

from saehooks.attachments import read
from saehooks.attachments.foreign import _bare
from saehooks.sae import SAE

TOKENS = torch.tensor([[0, 5, 6, 7, 8, 9]])


def said(model, sae, **options):
    """What is warned of when a block is entered."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad(), read(model, sae, **options):
            model(TOKENS)
    return [str(one.message) for one in caught if "this SAE was trained" in str(one.message)]


@pytest.mark.parametrize(
    ("trained", "at", "warned"),
    [
        ("model.layers.1", "model.layers.1", False),
        ("model.layers.1", "model.layers.2", True),
        ("model.layers.1", "model.layers.1.mlp", True),
        ("blocks.1.hook_resid_post", "model.layers.1", False),
        ("blocks.2.hook_resid_pre", "model.layers.1", False),
        ("blocks.1.hook_resid_pre", "model.layers.1", True),
        ("blocks.1.hook_mlp_out", "model.layers.1.mlp", True),
        (None, "model.layers.1", False),
    ],
)
def test_another_site_than_the_trained_one_warns(tiny_hf, trained, at, warned):
    """Unless both names mean the same point of the residual stream."""
    sae = SAE(32, 64, "linear", "relu", hook_name=trained)
    found = said(tiny_hf, sae, at=at)
    assert found == ([f"this SAE was trained at '{trained}', and is being attached at '{at}'"] if warned else [])


def test_the_same_point_under_other_names_does_not_warn(tiny_bridge, tiny_clip):
    """Aliases, resid_post before resid_pre, module paths of a CLIP."""
    sae = SAE(32, 64, "linear", "relu", hook_name="blocks.1.hook_resid_post")
    assert said(tiny_bridge, sae, at="blocks.1.hook_out") == said(tiny_bridge, sae, at="blocks.2.hook_resid_pre") == []
    assert len(said(tiny_bridge, sae, at="blocks.1.hook_resid_pre")) == 1
    sae = SAE(24, 64, "linear", "relu", hook_name="text.blocks.0.hook_resid_post")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with read(tiny_clip, sae, at="transformer.resblocks.0"):
            tiny_clip.encode_text(TOKENS.new_zeros(1, 8))


def test_a_head_is_a_place_of_its_own(tiny_bridge):
    """An SAE of one head warns at another."""
    sae = SAE(8, 16, "linear", "relu", hook_name="blocks.1.attn.hook_z")
    sae.cfg.metadata["head"] = 2
    assert said(tiny_bridge, sae) == []
    assert len(said(tiny_bridge, sae, at="blocks.1.attn.hook_z", head=3)) == 1


def test_two_names_of_one_model_do_not_warn(tiny_hf, monkeypatch):
    """gpt2-small is gpt2, and whatever TransformerLens calls otherwise is what it says."""
    for there, here in (("gpt2-small", "gpt2"), ("gpt2", "openai-community/gpt2"), ("GPT2", "gpt2-small")):
        sae = SAE(32, 64, hook_name="model.layers.1")
        sae.cfg.metadata["model_name"] = there
        tiny_hf.config._name_or_path = here
        assert said(tiny_hf, sae) == []
    tiny_hf.config._name_or_path = "gpt2-medium"
    assert said(tiny_hf, sae) == ["this SAE was trained on 'GPT2', and is being attached to 'gpt2-medium'"]
    table = types.SimpleNamespace(MODEL_ALIASES={"org/Model-V1": ["model", "Model-7b"]})
    monkeypatch.setitem(sys.modules, "transformer_lens.supported_models", table)
    assert _bare("model-7b") == _bare("Org/Model-v1") == _bare("model") != _bare("model-v2")
