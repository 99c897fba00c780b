"""Running a model on batches, for the output that is measured."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from saehooks.evaluation.embeddings import EmbeddingComparison
from saehooks.evaluation.measurement import Measurement
from saehooks.hosts import host as host_of
from saehooks.hosts.towers import two_towers
from saehooks.streams import checked_batches

TOKENS_AT_ONCE = 1024
"""Tokens in a forward by default: enough to keep two cores or a GPU busy, and logits within 200 MB."""

IMAGES_AT_ONCE = 64


def rows_at_once(shape: tuple[int, ...]) -> int:
    """The default number of sequences, or images, of one shape in a forward."""
    return max(1, TOKENS_AT_ONCE // max(1, shape[0])) if len(shape) == 1 else IMAGES_AT_ONCE


def as_batches(batches: Any) -> Iterable[Any]:
    """The batches of anything that ``sh.measure(model, sae, batches)`` takes: one tensor alone is cut into some."""
    if isinstance(batches, Tensor):
        return batches.split(rows_at_once(tuple(batches.shape[1:])))
    return checked_batches(batches)


def run_batch(model: Any, found: Measurement, batch: Any) -> None:
    """Call the model on tokens, images, a text, a dict of arguments, or a loader's (images, labels).

    Args:
        found: takes the labels of a loader, where it classifies.
    """
    host = host_of(model)
    batch = host.to_device(batch)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        if len(batch) > 1 and isinstance(found.comparison, EmbeddingComparison):
            found.comparison.offer_labels(batch[1])
        batch = batch[0]
    if host.family == "open_clip" or two_towers(host.model) is not None:
        host.run(batch)
        return
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    if isinstance(batch, Mapping):
        model(**{**options, **batch})
    else:
        model(batch, **options)
