"""Exports, read as their readers read them."""

from __future__ import annotations

import importlib.util
import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import saehooks as sh
from saehooks.errors import ConfigError
from saehooks.latents.delphi import write_delphi
from saehooks.latents.neuronpedia import write_neuronpedia

ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}
FEATURE = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices",
    "correlated_features_l1", "correlated_features_pearson", "neg_str", "neg_values", "pos_str", "pos_values",
    "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights", "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values", "decoder_weights_dist", "activations",
}  # fmt: skip
"""What Neuronpedia's converter takes from a feature."""


def test_neuronpedia_reads_every_latent(nasty_index, tmp_path):
    """Each live latent is in one batch, with all fields of the format and the index's own figures."""
    files = write_neuronpedia(nasty_index, tmp_path, model_id="tiny", sae_set="res-tiny", latents_per_file=40)
    assert [file.name for file in files] == ["batch-0.json", "batch-1.json", "batch-2.json", "skipped_indexes.json"]
    batches = [json.loads(file.read_text()) for file in files[:-1]]
    assert {(batch["model_id"], batch["layer"], batch["sae_set"], batch["sae_id_suffix"]) for batch in batches} == {
        ("tiny", 1, "res-tiny", None)
    }
    features = [feature for batch in batches for feature in batch["features"]]
    skipped = json.loads(files[-1].read_text())["skipped_indexes"]
    assert sorted([feature["feature_index"] for feature in features] + skipped) == list(range(96))
    for feature in features:
        assert feature.keys() >= FEATURE
        latent = nasty_index[feature["feature_index"]]
        assert feature["frac_nonzero"] == latent.density
        assert sum(feature["freq_hist_data_bar_heights"]) == pytest.approx(latent.count, rel=0.01)
        assert feature["pos_str"] == [piece for piece, _ in latent.raises]
        assert len(feature["activations"]) == len(latent.contexts) + len(latent.sampled)
        for activation in feature["activations"]:
            assert activation.keys() >= ACTIVATION
            assert len(activation["tokens"]) == len(activation["values"])
            value = activation["values"][activation["qualifying_token_index"]]
            assert activation["bin_min"] <= value + 1e-5
            assert value <= activation["bin_max"] + 1e-5
        top = feature["activations"][0]
        assert max(top["values"]) == pytest.approx(latent.largest, rel=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("sae_dashboard") is None, reason="sae-dashboard is not installed")
def test_saedashboard_takes_the_files(nasty_index, tmp_path):
    """SAEDashboard's own classes are built from a batch."""
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

    file = write_neuronpedia(nasty_index, tmp_path, model_id="tiny", sae_set="res-tiny")[0]
    content = json.loads(file.read_text())
    batch = NeuronpediaDashboardBatch(**content)
    assert len(batch.features) == 96 - len(nasty_index.dead)


@pytest.mark.parametrize("n_splits", [1, 5])
def test_delphi_reads_every_activation(model, sae, batches, tmp_path, n_splits):
    """Locations, values and tokens, read back as delphi's loader does, are those of the codes where the SAE acts."""
    folder = write_delphi(model, sae, batches, tmp_path, n_splits=n_splits, where=slice(1, None), model_name="org/tiny")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_name"] == "org/tiny"
    assert config["cache_ctx_len"] == 20
    dense = torch.zeros(12, 20, 96)
    edges = []
    for file in sorted(folder.glob("*.safetensors")):
        start, end = map(int, file.stem.split("_"))
        edges.append((start, end))
        found = load_file(file)
        assert found["activations"].dtype == np.float16
        assert found["locations"].dtype in (np.uint16, np.uint32)
        assert np.array_equal(found["tokens"], torch.cat(batches).numpy())
        places = torch.tensor(found["locations"].astype(np.int64))
        places[:, 2] += start
        dense[tuple(places.T)] = torch.tensor(found["activations"].astype(np.float32))
    edges.sort()
    assert edges[0][0] == 0
    assert edges[-1][1] == 95
    assert all(b[0] == a[1] + 1 for a, b in itertools.pairwise(edges))
    with sh.read(model, sae, where=slice(1, None)) as trace:
        model(torch.cat(batches))
    expected = trace.codes.dense().detach().half().float()
    expected[:, 0] = 0
    assert torch.allclose(dense, expected, rtol=2e-3, atol=1e-6)
    assert not list(folder.glob(".*"))


def test_what_cannot_be_exported_is_named(model, sae, batches, tmp_path, tiny_clip):
    """Texts of several lengths, no texts, images; and nothing half done is left."""
    with pytest.raises(ConfigError, match="one length"):
        write_delphi(model, sae, [batches[0], batches[1][:, :9]], tmp_path)
    with pytest.raises(ConfigError, match="empty"):
        write_delphi(model, sae, [], tmp_path)
    assert not list((tmp_path / "model.layers.1").iterdir())
    name = "visual.blocks.1.hook_resid_post"
    images = sh.survey(tiny_clip, sh.SAE(d_in=32, d_sae=16, hook_name=name), [torch.rand(2, 3, 16, 16)])
    with pytest.raises(ConfigError, match="images"):
        write_neuronpedia(images, tmp_path, sae_set="x")
