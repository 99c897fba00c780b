"""Every published autoencoder of this line by its name, and the Sparsemax SAE as this package trains it.

Each is a cell of the grid with its settings.

A preset returns an SAE; the loss that goes with its activation is what training uses when none is given
(`saehooks.training.losses.default_loss`). All take further settings of their cell, ``dtype``, ``device`` and
``hook_name``.

>>> sae = topk_sae(d_in=8, d_sae=32, k=4)
>>> sae.cfg.dictionary, sae.cfg.activation, sae.cfg.settings
('linear', 'topk', {'k': 4})
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from saehooks.activations import fit_zipf
from saehooks.errors import ConfigError
from saehooks.sae import SAE
from saehooks.training.losses import default_loss

__all__ = [
    "PRESETS",
    "batchtopk_sae",
    "default_loss",
    "entmax_sae",
    "feature_choice_from",
    "feature_choice_sae",
    "gated_sae",
    "jumprelu_sae",
    "kron_sae",
    "mlp_sparsemax_sae",
    "mutual_choice_sae",
    "one_pass_sparsemax_sae",
    "published_sparsemax_sae",
    "relu_sae",
    "sparsemax_sae",
    "topk_sae",
    "transformer_relu_sae",
]


def relu_sae(d_in: int, d_sae: int, **settings: Any) -> SAE:
    """The ReLU SAE: linear dictionary, relu. Loss: l1 weighed by decoder norms, so directions need no constraint.

    Activations are normalised, as is usual where biases must learn. Source: Bricken et al. 2023, Towards
    Monosemanticity; the norms in the penalty: Anthropic, April 2024 update.
    """
    return SAE(d_in, d_sae, "linear", "relu", **{"normalize": True, **settings})


def gated_sae(d_in: int, d_sae: int, **settings: Any) -> SAE:
    """The Gated SAE: linear dictionary, gates and magnitudes apart. Loss: l1 on the gates and their own reconstruction.

    Activations are normalised. Source: Rajamanoharan et al. 2024, arXiv:2404.16014.
    """
    return SAE(d_in, d_sae, "linear", "gated", **{"normalize": True, **settings})


def jumprelu_sae(d_in: int, d_sae: int, **settings: Any) -> SAE:
    """The JumpReLU SAE: linear dictionary, a learned threshold for each latent, bandwidth 0.001. Loss: l0.

    The paper's small first threshold and bandwidth need long training. For a short one set ``start_l0``, a larger
    ``bandwidth``, and ``LossConfig(l0=1.0, l0_target=...)``. Source: Rajamanoharan et al. 2024, arXiv:2407.14435.
    """
    return SAE(d_in, d_sae, "linear", "jumprelu", **settings)


def topk_sae(d_in: int, d_sae: int, *, k: int = 32, **settings: Any) -> SAE:
    """The TopK SAE: linear dictionary, the k largest scores. Loss: aux_k, weight 1/32.

    Source: Gao et al. 2024, arXiv:2406.04093.
    """
    return SAE(d_in, d_sae, "linear", "topk", k=k, **settings)


def batchtopk_sae(d_in: int, d_sae: int, *, k: int = 32, **settings: Any) -> SAE:
    """The BatchTopK SAE: linear dictionary, the k * rows largest scores of the batch; in use a threshold. Loss: aux_k.

    Source: Bussmann et al. 2024, arXiv:2412.06410.
    """
    return SAE(d_in, d_sae, "linear", "batchtopk", k=k, **settings)


def mutual_choice_sae(d_in: int, d_sae: int, *, k: int = 32, **settings: Any) -> SAE:
    """The Mutual Choice SAE: linear dictionary, the k * rows largest affinities. Loss: aux_zipf, weight 1/32.

    Source: Ayonrinde 2024, arXiv:2411.02124.
    """
    return SAE(d_in, d_sae, "linear", "mutual_choice", k=k, **settings)


def feature_choice_sae(d_in: int, d_sae: int, *, k: int = 32, budgets: str = "zipf", **settings: Any) -> SAE:
    """The Feature Choice SAE: each latent takes its own top tokens, budgets along a Zipf curve. Loss: aux_zipf.

    Usually fine-tuned from Mutual Choice: see `feature_choice_from`. Source: Ayonrinde 2024, arXiv:2411.02124.
    """
    return SAE(d_in, d_sae, "linear", "feature_choice", k=k, budgets=budgets, **settings)


def feature_choice_from(trained: SAE, *, budgets: str = "zipf") -> SAE:
    """A Feature Choice SAE that starts where a trained one ended, its Zipf curve fitted to that one's densities.

    Args:
        trained: usually a Mutual Choice SAE.
        budgets: ``"zipf"`` or ``"uniform"``.
    Raises:
        ConfigError: the SAE did not count how often its latents fire, or has no k.
    """
    density, settings = trained.density.mean, dict(trained.cfg.settings)
    if density is None or "k" not in settings:
        raise ConfigError("feature choice continues an SAE with a k and with tracked densities, such as mutual choice")
    curve = fit_zipf(density)
    fitted = {"zipf_shift": curve.shift, "zipf_exponent": max(0.0, curve.exponent)}
    sae = SAE(
        trained.d_in,
        trained.d_sae,
        trained.cfg.dictionary,
        "feature_choice",
        dtype=trained.dtype,
        device=trained.device,
        hook_name=trained.hook_name,
        **{**settings, **fitted, "budgets": budgets},
    )
    sae.dictionary.load_state_dict(trained.dictionary.state_dict())
    sae.density.load_state_dict(trained.density.state_dict())
    sae.finished = True
    return sae


def sparsemax_sae(d_in: int, d_sae: int, **settings: Any) -> SAE:
    """The Sparsemax SAE as this package trains it: shared concepts, sparsemax that chooses twice, values refined.

    Sparsemax chooses widely by the scores, and again among the chosen latents by scores that one refinement has
    improved; two more refine the values. Loss: reconstruction by row, .02 of it by energy, and .3 of it before
    refinement. Of all cells it reconstructs best from a given number of latents (`recipes/results/refinement.md`); a
    training step costs two to four of `one_pass_sparsemax_sae`. In short trainings it learns best at a rate of 4e-3, as
    the others do.

    How many latents a token uses follows the data: on SmolLM2 20 to 50, by the site. A larger ``key_scale``, beside
    ``value_scale = 1 / key_scale``, chooses fewer. With ``refine=0``, ``values="weight"`` or
    ``refine_method="conjugate"``, which leave nothing to choose by again, it is `one_pass_sparsemax_sae`.
    Source: this package (`saehooks.refinement`); refinement as in Gregor & LeCun 2010; the grid's cell: Sparsemax SAE,
    CVPR 2026.
    """
    given: dict[str, Any] = {"key_scale": 0.55, "value_scale": 1.8, "reselect": 1.4}
    given |= {"refine": 3, "refine_rate": 0.4, "refine_method": "bounded"}
    chooses_once = settings.get("values", "score") != "score" or settings.get("refine_method") == "conjugate"
    if chooses_once or settings.get("refine") == 0:
        return one_pass_sparsemax_sae(d_in, d_sae, **settings)
    return SAE(d_in, d_sae, "concepts", "sparsemax", **{**given, **settings})


def one_pass_sparsemax_sae(d_in: int, d_sae: int, **settings: Any) -> SAE:
    """The Sparsemax SAE in one pass: shared concepts, sparsemax. Loss: reconstruction alone.

    What ``SAE(d_in, d_sae)`` makes. Values are the scores on the sparsemax support, as in the authors' code; relative
    to it this one is centred on a learned bias and its keys start at the concepts' own directions. Source: Sparsemax
    SAE, CVPR 2026.
    """
    return SAE(d_in, d_sae, "concepts", "sparsemax", **settings)


def published_sparsemax_sae(d_in: int, d_sae: int, *, max_density: float | None = 0.1, **settings: Any) -> SAE:
    """The Sparsemax SAE as the authors' code runs it: not centred, no epsilon, over-frequent latents silenced.

    Loss: ``LossConfig(reconstruction="per_norm")``; Adam, lr 4e-4, constant after 500 steps of warm-up. Their tables
    start from random matrices; here, as everywhere, keys start at the concepts. Source: Sparsemax SAE, CVPR 2026.
    """
    given = {"center": False, "eps": 0.0, "values": "score", "max_density": max_density}
    return SAE(d_in, d_sae, "concepts", "sparsemax", **{**given, **settings})


def mlp_sparsemax_sae(d_in: int, d_sae: int, **settings: Any) -> SAE:
    """The paper's ablation "MLP + sparsemax": linear dictionary, sparsemax. Loss: reconstruction alone.

    Activations are normalised, since the supports of sparsemax depend on the scale of scores. Source: Sparsemax SAE,
    CVPR 2026.
    """
    return SAE(d_in, d_sae, "linear", "sparsemax", **{"normalize": True, **settings})


def transformer_relu_sae(d_in: int, d_sae: int, **settings: Any) -> SAE:
    """The paper's ablation "Transformer + ReLU": shared concepts, relu. Loss: l1. Source: Sparsemax SAE, CVPR 2026."""
    return SAE(d_in, d_sae, "concepts", "relu", **settings)


def entmax_sae(d_in: int, d_sae: int, *, alpha: float = 1.5, **settings: Any) -> SAE:
    """Shared concepts with alpha-entmax for sparsemax, which the paper names as open. Loss: reconstruction alone.

    At equal scores entmax selects far more than sparsemax, so keys start larger, by what gives 32 scores spread evenly
    below the largest the same support, and values smaller by as much. Source: Peters et al. 2019, arXiv:1905.05702.
    """
    if 1 < alpha <= 2:
        power = 1 / (alpha - 1)
        scale = ((power + 1) / 32) ** (alpha - 1) * power / (2 / 32)
        settings = {"key_scale": scale, "value_scale": 1 / scale, **settings}
    return SAE(d_in, d_sae, "concepts", "entmax", alpha=alpha, **settings)


def kron_sae(d_in: int, d_sae: int, *, k: int = 32, m: int = 4, n: int = 4, **settings: Any) -> SAE:
    """KronSAE: heads of m x n pairs of two small encoders that meet by a smooth AND, then top-k. Loss: aux_k.

    Source: arXiv:2505.22255.
    """
    return SAE(d_in, d_sae, "kron", "topk", k=k, m=m, n=n, **settings)


PRESETS: dict[str, Callable[..., SAE]] = {
    preset.__name__.removesuffix("_sae"): preset
    for preset in (
        relu_sae,
        gated_sae,
        jumprelu_sae,
        topk_sae,
        batchtopk_sae,
        mutual_choice_sae,
        feature_choice_sae,
        sparsemax_sae,
        one_pass_sparsemax_sae,
        published_sparsemax_sae,
        mlp_sparsemax_sae,
        transformer_relu_sae,
        entmax_sae,
        kron_sae,
    )
}
"""Presets by name: ``PRESETS["topk"](d_in=576, d_sae=3072, k=32)``."""


def __getattr__(name: str) -> Any:
    plain = name.lower().replace("_", "").replace("sae", "")
    meant = next((one for one in __all__ if one.replace("_", "").replace("sae", "") == plain), None)
    hint = f"did you mean {meant}?" if meant else f"there are {', '.join(sorted(__all__))}"
    raise AttributeError(f"saehooks.presets has no {name!r}; {hint}")
