"""Attach sparse autoencoders to the hook points of transformer models.

>>> sorted(name for name in __all__ if name.islower())[:4]
['ablate', 'attach', 'causal', 'clamp']
"""

from saehooks import causal, edits, presets
from saehooks.activations.sparsemax import sparsemax
from saehooks.attachments import ablate, attach, clamp, read, scale, splice, steer
from saehooks.causal import rank_latents
from saehooks.codes import Codes
from saehooks.evaluation import measure
from saehooks.formats import load
from saehooks.hosts import sites
from saehooks.latents import LatentIndex, survey
from saehooks.sae import SAE, SAEConfig, SAEOutput
from saehooks.streams import Activations, ImageBatches, TokenBatches, harvest
from saehooks.trace import Trace
from saehooks.training.fit import fit, train
from saehooks.training.losses import LossConfig
from saehooks.training.trainer import TrainConfig, Trainer
from saehooks.where import everywhere, last, not_special, pooled, positions, steps, tokens

__all__ = [
    "SAE",
    "Activations",
    "Codes",
    "ImageBatches",
    "LatentIndex",
    "LossConfig",
    "SAEConfig",
    "SAEOutput",
    "TokenBatches",
    "Trace",
    "TrainConfig",
    "Trainer",
    "ablate",
    "attach",
    "causal",
    "clamp",
    "edits",
    "everywhere",
    "fit",
    "harvest",
    "last",
    "load",
    "measure",
    "not_special",
    "pooled",
    "positions",
    "presets",
    "rank_latents",
    "read",
    "scale",
    "sites",
    "sparsemax",
    "splice",
    "steer",
    "steps",
    "survey",
    "tokens",
    "train",
]
