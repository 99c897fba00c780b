"""Presets: every published SAE by name, each the cell and the settings it says."""

from __future__ import annotations

import pytest
import torch

from saehooks import SAE, presets
from saehooks.activations import ACTIVATIONS
from saehooks.errors import ConfigError
from saehooks.training.losses import LossConfig, training_loss

CELLS = {
    "relu": ("linear", "relu"),
    "gated": ("linear", "gated"),
    "jumprelu": ("linear", "jumprelu"),
    "topk": ("linear", "topk"),
    "batchtopk": ("linear", "batchtopk"),
    "mutual_choice": ("linear", "mutual_choice"),
    "feature_choice": ("linear", "feature_choice"),
    "sparsemax": ("concepts", "sparsemax"),
    "published_sparsemax": ("concepts", "sparsemax"),
    "one_pass_sparsemax": ("concepts", "sparsemax"),
    "mlp_sparsemax": ("linear", "sparsemax"),
    "transformer_relu": ("concepts", "relu"),
    "entmax": ("concepts", "entmax"),
    "kron": ("kron", "topk"),
}


def test_every_preset_is_its_cell():
    """Named constructors give the cell of the table, take further settings, and leave no activation out."""
    assert set(presets.PRESETS) == set(CELLS)
    for name, cell in CELLS.items():
        more = {"k": 4} if "k" in presets.PRESETS[name](8, 64).cfg.settings else {}
        sae = presets.PRESETS[name](8, 64, dtype=torch.float64, hook_name="site", **more)
        assert (sae.cfg.dictionary, sae.cfg.activation) == cell
        assert (sae.dtype, sae.hook_name) == (torch.float64, "site")
        assert presets.PRESETS[name].__doc__.count("Source: ") == 1
    assert {activation for _, activation in CELLS.values()} == set(ACTIVATIONS)


def test_settings_reach_their_part():
    """Settings of dictionary and activation pass through; unknown ones are refused."""
    assert presets.kron_sae(8, 64, k=5, m=2, n=8).dictionary.heads == 4
    assert presets.sparsemax_sae(8, 64, values="weight").activation.value_kind == "weight"
    assert presets.sparsemax_sae(8, 64, key_scale=0.8).refinement.reselect == 1.4
    with pytest.raises(ConfigError, match="colour"):
        presets.topk_sae(8, 64, colour="red")


@pytest.mark.parametrize("given", [{"refine": 0}, {"values": "weight"}, {"refine": 2, "refine_method": "conjugate"}])
def test_the_default_in_one_pass(given):
    """Settings that leave nothing to choose by a second time make the cell itself, with nothing else of the preset."""
    assert presets.sparsemax_sae(8, 64, **given).cfg == SAE(8, 64, "concepts", "sparsemax", **given).cfg


def test_published_settings_are_the_authors():
    """Scores s = x / |x| (C k)^T on the sparsemax support, times (C v) and the norm; nothing else."""
    torch.manual_seed(0)
    sae = presets.published_sparsemax_sae(8, 64, dtype=torch.float64)
    with torch.no_grad():
        sae.dictionary.W_k.normal_()
        sae.dictionary.W_v.normal_()
    C, k, v = sae.dictionary.C, sae.dictionary.W_k, sae.dictionary.W_v
    x = torch.randn(20, 8, dtype=torch.float64)
    scores = x / x.norm(dim=1, keepdim=True) @ (C @ k).T
    ordered = scores.sort(dim=1, descending=True).values
    size = (1 + torch.arange(1, 65) * ordered > ordered.cumsum(1)).sum(1, keepdim=True)
    tau = (ordered.cumsum(1).gather(1, size - 1) - 1) / size
    expected = x.norm(dim=1, keepdim=True) * ((scores * (scores > tau)) @ (C @ v))
    out = sae.eval()(x)
    torch.testing.assert_close(out.recons, expected)
    loss = training_loss(sae, x, LossConfig(reconstruction="per_norm"))
    by_hand = 10 * ((out.recons - x).square() / x.norm(dim=1, keepdim=True)).mean()
    torch.testing.assert_close(loss.total, by_hand)


def test_feature_choice_continues_mutual_choice():
    """Weights, counts and the fitted curve are taken over; other SAEs say what is missing."""
    torch.manual_seed(0)
    mutual = presets.mutual_choice_sae(8, 64, k=4)
    mutual.train()(torch.randn(200, 8))
    feature = presets.feature_choice_from(mutual)
    assert torch.equal(feature.dictionary.W_enc, mutual.dictionary.W_enc)
    assert torch.equal(feature.density.fired, mutual.density.fired)
    assert feature.activation.budgets == "zipf"
    assert feature.train()(torch.randn(50, 8)).codes.indices.numel() <= 200
    with pytest.raises(ConfigError, match="tracked densities"):
        presets.feature_choice_from(presets.topk_sae(8, 64, k=4))
