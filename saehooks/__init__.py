"""Attach sparse autoencoders to the hook points of transformer models.

>>> sorted(name for name in __all__ if name.islower())[:4]
['ablate', 'attach', 'causal', 'clamp']
"""

# attach, measure, sites and train are also rooms. They are all loaded here, before the verbs are bound, and Python
# binds a module only when it first loads it: so the verbs stay, whatever is imported later.
from saehooks import causal, edits
from saehooks.activations import sparsemax
from saehooks.attach import ablate, attach, clamp, read, scale, splice, steer
from saehooks.causal import rank_latents
from saehooks.codes import Codes
from saehooks.formats import load
from saehooks.losses import LossConfig
from saehooks.measure import measure
from saehooks.sae import SAE, SAEConfig, SAEOutput
from saehooks.sites import sites
from saehooks.stream import TokenBatches, harvest
from saehooks.trace import Trace
from saehooks.train import fit, train
from saehooks.trainer import TrainConfig, Trainer
from saehooks.where import last, not_special, positions

__all__ = [
    "SAE",
    "Codes",
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
    "fit",
    "harvest",
    "last",
    "load",
    "measure",
    "not_special",
    "positions",
    "rank_latents",
    "read",
    "scale",
    "sites",
    "sparsemax",
    "splice",
    "steer",
    "train",
]
