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

_ANSWERS = {
    **dict.fromkeys(
        ("load_sae", "from_pretrained", "load_from_hub", "load_model", "open"),
        "write sh.load('folder, hub id or release')",
    ),
    **dict.fromkeys(
        ("SparseAutoencoder", "SparseCoder", "AutoEncoder", "Sae", "TopKSAE"), "write sh.SAE(d_in=, d_sae=)"
    ),
    **dict.fromkeys(("Transcoder",), "write saehooks.sae.Transcoder"),
    **dict.fromkeys(
        ("run_with_cache", "run_with_saes", "run_with_cache_with_saes", "cache", "record", "get_acts", "encode"),
        "write: with sh.read(model, sae) as trace: model(tokens)",
    ),
    **dict.fromkeys(
        ("add_sae", "replace", "reconstruct", "substitute"), "write: with sh.splice(model, sae): model(tokens)"
    ),
    **dict.fromkeys(
        ("hook", "hooks", "intervene", "patch", "edit", "saes"),
        "write: with sh.attach(model, sae, edits=...): model(tokens)",
    ),
    **dict.fromkeys(
        ("zero", "zero_ablate", "ablation"), "write: with sh.ablate(model, sae, [1204, 77]): model(tokens)"
    ),
    **dict.fromkeys(
        ("train_sae", "SAETrainer", "LanguageModelSAETrainingRunner"), "write sh.fit(model, sae, batches, at=...)"
    ),
    **dict.fromkeys(("evaluate", "eval", "run_evals", "metrics_of"), "write sh.measure(model, sae, batches)"),
    **dict.fromkeys(
        ("features", "latents_of", "dashboard", "index", "explain", "Index", "FeatureDashboard"),
        "write index = sh.survey(model, sae, batches)",
    ),
    **dict.fromkeys(("attribution", "attribute", "attributions", "rank"), "write sh.rank_latents(model, sae, tokens)"),
    **dict.fromkeys(("hook_points", "list_sites", "hook_names"), "write sh.sites(model)"),
}
"""What to write, by the names of other libraries."""


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        found = getattr(import_module(f"saehooks.{_HOME_OF[name]}"), name)
    elif not name.startswith("_") and find_spec(f"saehooks.{name}") is not None:
        found = import_module(f"saehooks.{name}")
    else:
        from saehooks.answers import no_attribute

        raise no_attribute(import_module("saehooks"), name, _ANSWERS, "module 'saehooks'")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
