"""Activations: which scores are active, and what value each carries. One file per family."""

from saehooks.activations.base import Activation
from saehooks.activations.sparsemax import SparsemaxActivation, SparsemaxResult, sparsemax
from saehooks.activations.topk import TopKActivation

ACTIVATIONS: dict[str, type[Activation]] = {kind.name: kind for kind in (SparsemaxActivation, TopKActivation)}

__all__ = ["ACTIVATIONS", "Activation", "SparsemaxActivation", "SparsemaxResult", "TopKActivation", "sparsemax"]
