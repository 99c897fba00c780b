"""Activations: which scores are active, and what value each carries. One file per family."""

from saehooks.activations.base import Activation
from saehooks.activations.choice import FeatureChoiceActivation, MutualChoiceActivation
from saehooks.activations.density import LatentDensity
from saehooks.activations.entmax import EntmaxActivation
from saehooks.activations.relu import GatedActivation, JumpReLUActivation, ReLUActivation
from saehooks.activations.sparsemax import SparsemaxActivation, SparsemaxResult
from saehooks.activations.topk import BatchTopKActivation, TopKActivation
from saehooks.activations.zipf import Zipf, fit_zipf

KINDS: tuple[type[Activation], ...] = (
    ReLUActivation,
    GatedActivation,
    JumpReLUActivation,
    TopKActivation,
    BatchTopKActivation,
    MutualChoiceActivation,
    FeatureChoiceActivation,
    SparsemaxActivation,
    EntmaxActivation,
)

ACTIVATIONS: dict[str, type[Activation]] = {kind.name: kind for kind in KINDS}

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "BatchTopKActivation",
    "EntmaxActivation",
    "FeatureChoiceActivation",
    "GatedActivation",
    "JumpReLUActivation",
    "LatentDensity",
    "MutualChoiceActivation",
    "ReLUActivation",
    "SparsemaxActivation",
    "SparsemaxResult",
    "TopKActivation",
    "Zipf",
    "fit_zipf",
]
