"""Write an index as SAEDashboard writes for Neuronpedia: ``batch-0.json``, ``batch-1.json``, ...

Source: SAEDashboard's ``neuronpedia_dashboard.py`` and Neuronpedia's ``convert-saedashboard-to-neuronpedia-export.py``,
which reads these files.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from saehooks.errors import ConfigError
from saehooks.latents.index import LatentIndex
from saehooks.latents.latent import Latent
from saehooks.latents.result import Context, SurveyResult
from saehooks.show.contexts import histogram
from saehooks.storage import write_file

BARS = 50
INTERVALS = 4
"""Groups, of equally many values, of the contexts drawn at random."""

UNKNOWN: dict[str, list[Any]] = {
    name: []
    for name in (
        "neuron_alignment_indices",
        "neuron_alignment_values",
        "neuron_alignment_l1",
        "correlated_neurons_indices",
        "correlated_neurons_l1",
        "correlated_neurons_pearson",
        "logits_hist_data_bar_heights",
        "logits_hist_data_bar_values",
        "decoder_weights_dist",
    )
}
"""Fields that the readers want and an index does not have."""


def write_neuronpedia(
    index: LatentIndex,
    folder: str | Path,
    *,
    model_id: str = "",
    sae_set: str,
    layer: int | None = None,
    dataset: str = "",
    latents_per_file: int = 256,
) -> list[Path]:
    """Write an index of a language model's SAE in Neuronpedia's format.

    Args:
        index: of texts.
        folder: made if missing.
        model_id: Neuronpedia's name of the model; by default the model's own.
        sae_set: Neuronpedia's name of the set of SAEs, such as ``"res-sparsemax"``.
        layer: by default the number in the site's name.
        dataset: what the texts were, as shown on Neuronpedia.
        latents_per_file: latents in one ``batch-N.json``.
    Returns:
        The files: the batches, and ``skipped_indexes.json``, which names the dead latents.
    Raises:
        ConfigError: an index of images, or a site whose name has no number.
    """
    if index.metadata["grid"] is not None:
        raise ConfigError("Neuronpedia shows texts; this index is of images")
    numbers = re.findall(r"\d+", index.site)
    if layer is None and not numbers:
        raise ConfigError(f"the site '{index.site}' has no layer number in its name: give layer=")
    layer = int(numbers[0]) if layer is None else layer
    model_id = model_id or str(index.metadata["model"].get("model_name") or "").rsplit("/", 1)[-1].lower()
    head = {"model_id": model_id, "layer": layer, "sae_set": sae_set, "sae_id_suffix": None}
    dead = set(index.dead.tolist())
    alive = [latent for latent in range(len(index)) if latent not in dead]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, start in enumerate(range(0, len(alive), latents_per_file)):
        features = [_feature(index[latent], dataset) for latent in alive[start : start + latents_per_file]]
        files.append(_write(folder / f"batch-{number}.json", {**head, "features": features}))
    skipped = {**head, "layer": str(layer), "log_sparsity": None, "skipped_indexes": sorted(dead)}
    return [*files, _write(folder / "skipped_indexes.json", skipped)]


def _write(file: Path, content: dict[str, Any]) -> Path:
    write_file(file, json.dumps(content, allow_nan=False).encode())
    return file


def _feature(latent: Latent, dataset: str) -> dict[str, Any]:
    index = latent.index
    heights, low, high = histogram(index.quantiles[latent.latent].tolist(), BARS)
    step = (high - low) / BARS
    contexts = [_activation(index, context, -1.0, latent.largest, -1.0) for context in latent.contexts]
    return {
        **UNKNOWN,
        "feature_index": latent.latent,
        "neg_str": [piece for piece, _ in latent.lowers],
        "neg_values": [round(change, 4) for _, change in latent.lowers],
        "pos_str": [piece for piece, _ in latent.raises],
        "pos_values": [round(change, 4) for _, change in latent.raises],
        "frac_nonzero": latent.density,
        "freq_hist_data_bar_values": [round(low + step * (i + 0.5), 6) for i in range(BARS)],
        "freq_hist_data_bar_heights": [round(height * latent.count, 3) for height in heights],
        "correlated_features_indices": [other for other, _ in latent.fires_with],
        "correlated_features_pearson": [round(cosine, 4) for _, cosine in latent.fires_with],
        "correlated_features_l1": [],
        "n_prompts_total": index.sequences,
        "n_tokens_in_prompt": round(index.positions / max(1, index.sequences)),
        "dataset": dataset,
        "activations": contexts + _intervals(latent),
    }


def _intervals(latent: Latent) -> list[dict[str, Any]]:
    """The contexts drawn at random, in intervals that hold equally many values each."""
    edges = [latent.quantile(i / INTERVALS) for i in range(INTERVALS + 1)]
    found = []
    for context in latent.sampled:
        place = next((i for i in range(INTERVALS) if context.value <= edges[i + 1]), INTERVALS - 1)
        found.append(_activation(latent.index, context, edges[place], edges[place + 1], 1 / INTERVALS))
    return found


def _activation(index: SurveyResult, context: Context, low: float, high: float, share: float) -> dict[str, Any]:
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "qualifying_token_index": context.peak,
        "tokens": [index.piece(token) for token in context.tokens or ()],
        "values": [0.0 if math.isnan(value) else round(value, 6) for value in context.values],
    }
