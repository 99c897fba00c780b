"""Attach sparse autoencoders to the hook points of transformer models.

>>> sorted(name for name in __all__ if name.islower())[:4]
['ablate', 'attach', 'causal', 'clamp']
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Names are imported when they are first asked for: `import saehooks` alone costs next to nothing.
_HOMES = {
    "activations.sparsemax": ("sparsemax",),
    "attachments": ("ablate", "attach", "clamp", "read", "scale", "splice", "steer"),
    "causal": ("rank_latents",),
    "codes": ("Codes",),
    "evaluation": ("measure",),
    "formats": ("load",),
    "hosts": ("sites",),
    "latents": ("LatentIndex", "survey"),
    "sae": ("SAE", "SAEConfig", "SAEOutput"),
    "streams": ("Activations", "ImageBatches", "TokenBatches", "harvest"),
    "trace": ("Trace",),
    "training.fit": ("fit", "train"),
    "training.losses": ("LossConfig",),
    "training.trainer": ("TrainConfig", "Trainer"),
    "where": ("everywhere", "last", "not_special", "pooled", "positions", "steps", "tokens"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        found = getattr(import_module(f"saehooks.{_HOME_OF[name]}"), name)
    elif not name.startswith("_") and find_spec(f"saehooks.{name}") is not None:
        found = import_module(f"saehooks.{name}")
    else:
        raise AttributeError(f"module 'saehooks' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
