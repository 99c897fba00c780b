"""What training minimises: a reconstruction term, and the penalties and auxiliary terms an activation asks for.

All terms are relative to the size of the activations, so a coefficient means the same at every site of every model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from saehooks.activations.zipf import fit_zipf
from saehooks.activations.zipf import ranks as density_ranks
from saehooks.codes import Codes
from saehooks.errors import ConfigError
from saehooks.kernels import DEFAULT, Step, TopK, for_rows, squared_errors
from saehooks.ranks import Alone, mean_of_all
from saehooks.sae import SAE, Encoded

RECONSTRUCTION = ("relative", "mse", "per_norm")
TINY = 1e-12
ALONE = Alone()


@dataclass(frozen=True)
class LossConfig:
    """Which terms the training loss has. The coefficients of penalties and auxiliary terms are 0 when they are off."""

    reconstruction: str = "relative"
    """See `reconstruction`."""
    energy: float = 0.0
    """Coefficient of a second reconstruction loss, ``"mse"``, in which each row weighs by its energy. In a loss by row
    the few tokens of huge norm weigh next to nothing and are learned late or never; in the NMSE of a text they weigh
    most."""
    l1: float = 0.0
    """Coefficient of the magnitudes of the codes, weighed by decoder norms: see `l1`."""
    l0: float = 0.0
    """Coefficient of the mean number of active latents; jumprelu only, whose thresholds it moves."""
    l0_target: float | None = None
    """Charge ``l0 * (L0 / l0_target - 1)^2`` instead of ``l0 * L0``. Source: arXiv:2407.14435, appendix."""
    penalty_warmup: int = 0
    """Training batches over which the coefficients of l1 and l0 rise from 0; counted by the trainer's ``step``."""
    gate: float = 0.0
    """Coefficient of the gate's own reconstruction; gated only."""
    aux_k: float = 0.0
    """Coefficient of the error's reconstruction by dead latents. Source: arXiv:2406.04093, appendix A.2."""
    aux_zipf: float = 0.0
    """Coefficient of the error's reconstruction by under-used latents. Source: arXiv:2411.02124."""
    prefix: float = 0.0
    """Coefficient of the mean reconstruction loss by the first latents alone, for each size in ``prefixes``: one SAE
    good at several sizes, with any activation. Source: Matryoshka SAEs, arXiv:2503.17547."""
    prefixes: tuple[int, ...] = ()
    """Ascending numbers of latents, each below d_sae."""
    first_pass: float = 0.0
    """Coefficient of the reconstruction loss of the codes before refinement; only with ``refine``. It keeps a gradient
    for the scores, whose size refinement makes matter less."""
    k_aux: int | None = None
    """Latents of a row in aux_k and aux_zipf; None for half of d_in."""
    dead_after: int = 50_000
    """A latent is dead, for aux_k, when it has not fired for this many rows."""
    zipf_share: float = 0.5
    """A latent is under-used, for aux_zipf, below this share of the density the Zipf curve expects at its rank."""

    def __post_init__(self) -> None:
        if self.reconstruction not in RECONSTRUCTION:
            raise ConfigError(f"reconstruction={self.reconstruction!r}: choose one of {', '.join(RECONSTRUCTION)}")
        negative = [
            n
            for n in ("l1", "l0", "gate", "aux_k", "aux_zipf", "prefix", "first_pass", "energy")
            if getattr(self, n) < 0
        ]
        if negative:
            raise ConfigError(f"coefficients must not be negative: {', '.join(negative)}")
        if (self.k_aux is not None and self.k_aux < 1) or (self.l0_target is not None and self.l0_target <= 0):
            raise ConfigError(f"k_aux and l0_target must be positive, got {self.k_aux} and {self.l0_target}")
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        ascending = all(a < b for a, b in zip((0, *self.prefixes), self.prefixes, strict=False))
        if not ascending or bool(self.prefixes) != bool(self.prefix):
            raise ConfigError(
                f"prefixes={self.prefixes}, prefix={self.prefix}: write ascending numbers of latents and a positive "
                "coefficient, such as LossConfig(prefixes=(512, 2048), prefix=1.0)"
            )


def default_loss(sae: SAE) -> LossConfig:
    """The loss that goes with an SAE's activation, where the user names none."""
    config = LossConfig(**sae.activation.default_loss)
    if not sae.refinement.steps:
        return config
    return replace(config, first_pass=0.3, energy=0.0 if sae.refinement.reselect is None else 0.02)


class TrainingLoss(NamedTuple):
    """The loss of one batch and what it was made from."""

    total: Tensor
    """Scalar, to be differentiated."""
    terms: dict[str, Tensor]
    """Each term, detached, by name; they add up to the total."""
    recons: Tensor
    """(rows, d_in), detached."""
    stages: Encoded
    """The stages of encoding, with codes."""
    figures: Mapping[str, Tensor] = MappingProxyType({})
    """Further scalars, detached, for the history."""


def training_loss(
    sae: SAE,
    x: Tensor,
    config: LossConfig,
    *,
    idle: Tensor | None = None,
    step: int | None = None,
    kernel_step: Step = DEFAULT,
    ranks: Alone = ALONE,
) -> TrainingLoss:
    """Encode, decode and score one batch.

    Args:
        sae: in train mode.
        x: (rows, d_in) activations in the dtype of the SAE.
        config: which terms.
        idle: (d_sae,) int64, rows seen since each latent last fired, for terms about dead latents.
        step: steps made before, for coefficients that rise; None for full coefficients.
        kernel_step: what the kernels know beside the tensors.
        ranks: the processes of which this one has some rows or latents. The mean over ranks of the gradients is then
            that of the loss of all rows.
    Raises:
        ConfigError: a term that this SAE cannot have.
    """
    stages = sae.encode_stages(x, decoding=True, step=kernel_step)
    recons = sae.decode_stages(stages, step=kernel_step)
    return loss_of(sae, x, stages, recons, config, idle=idle, step=step, kernel_step=kernel_step, ranks=ranks)


def loss_of(
    sae: SAE,
    x: Tensor,
    stages: Encoded,
    recons: Tensor,
    config: LossConfig,
    *,
    idle: Tensor | None = None,
    step: int | None = None,
    kernel_step: Step = DEFAULT,
    ranks: Alone = ALONE,
) -> TrainingLoss:
    """Score a batch that is already encoded and decoded.

    Args:
        stages: of ``x``.
        recons: (rows, d_in) decoded from ``stages.candidates``.
        sae, x, config, idle, step, kernel_step, ranks: as in `training_loss`, which raises the same.
    """
    center = sae.dictionary.offset
    terms = {config.reconstruction: reconstruction(x, recons, config.reconstruction, center, ranks)}
    if config.energy:
        terms["energy"] = config.energy * reconstruction(x, recons, "mse", center, ranks)
    risen = 1.0 if step is None or not config.penalty_warmup else min(1.0, (step + 1) / config.penalty_warmup)
    if config.l1:
        terms["l1"] = config.l1 * risen * l1(sae, x, stages)
    if config.l0:
        terms["l0"] = config.l0 * risen * l0(sae, stages, config.l0_target, ranks)
    if config.gate:
        terms["gate"] = config.gate * gate(sae, x, stages, config.reconstruction, ranks)
    if config.first_pass:
        if stages.first_pass is None:
            raise ConfigError(
                "first_pass= is a loss of codes before refinement: write refine=1 or more, or leave it out"
            )
        unrefined = sae.decode_stages(stages, first_pass=True, step=kernel_step)
        missed = reconstruction(x, unrefined, config.reconstruction, center, ranks)
        terms["first_pass"] = config.first_pass * missed
    if config.prefix:
        terms["prefix"] = config.prefix * prefixes(sae, x, stages, config, kernel_step, ranks)
    for name, coefficient in (("aux_k", config.aux_k), ("aux_zipf", config.aux_zipf)):
        if not coefficient:
            continue
        helpers = dead(idle, config) if name == "aux_k" else under_used(sae, config, ranks)
        if helpers is not None and sae.dictionary.total(helpers.numel()):
            error, weights = (x - recons).detach(), row_weights(x, config.reconstruction, center)
            found = auxiliary(sae, stages, error, helpers, config.k_aux, weights, kernel_step, ranks)
            terms[name] = coefficient * found
    total = torch.stack(list(terms.values())).sum()
    return TrainingLoss(total, {name: term.detach() for name, term in terms.items()}, recons.detach(), stages)


def reconstruction(
    x: Tensor, recons: Tensor, kind: str = "relative", center: Tensor | None = None, ranks: Alone = ALONE
) -> Tensor:
    """Scalar reconstruction loss of rows (rows, d_in).

    Args:
        x, recons: activations and their reconstruction.
        kind: ``"relative"``: each row's squared error over its squared norm, so every token counts alike;
            ``"mse"``: summed squared error over summed squared norm of the batch;
            ``"per_norm"``: ``10 * mean((recons - x)^2 / |x|)``, as in the authors' code of the Sparsemax SAE.
        center: (d_in,) subtracted from x before the norms of ``"relative"`` and ``"mse"`` are taken.
        ranks: of which the mean is the loss.
    """
    error = squared_errors(recons, x)
    if kind == "per_norm":
        return 10.0 * (error / x.norm(dim=1).clamp(min=TINY)).mean() / x.shape[1]
    energy = _energies(x, center)
    if kind == "relative":
        return (error / energy.clamp(min=TINY)).mean()
    if kind == "mse":
        return error.sum() / ranks.mean_over_rows(energy.sum()).clamp(min=TINY)
    raise ConfigError(f"loss {kind!r}: choose one of {', '.join(RECONSTRUCTION)}")


def row_weights(x: Tensor, kind: str, center: Tensor | None = None) -> Tensor:
    """(rows,) how much a row's squared error weighs in a reconstruction loss, up to a factor."""
    if kind == "mse":
        return x.new_ones(x.shape[0])
    return 1 / (_energies(x, center) if kind == "relative" else _norms(x, None)).clamp(min=TINY)


def _norms(x: Tensor, center: Tensor | None) -> Tensor:
    """(rows,) norms of rows (rows, d) about a center (d,), without gradient."""
    return (x if center is None else x - center).detach().norm(dim=1)


def _energies(x: Tensor, center: Tensor | None) -> Tensor:
    """(rows,) their squares."""
    if x.dtype.itemsize < 4:  # squares are rounded to the narrow type only once they are summed
        return _norms(x, center).square()
    x, center = x.detach(), x.new_zeros(x.shape[1]) if center is None else center.detach()
    return for_rows(x, center).squared_errors(x, center[None])


def l1(sae: SAE, x: Tensor, stages: Encoded) -> Tensor:
    """Scalar: mean over rows of ``sum |a_i| |W_i|``, relative to the row's own norm about the decoder's offset.

    Scaling by the decoder norms |W_i| keeps the penalty from being escaped by small codes and large directions.
    """
    codes = stages.candidates
    sizes = sae.activation.penalised(stages.scores, stages.support, codes.values)
    sizes = sizes * sae.dictionary.direction_norms()[codes.indices]
    rows = codes.rows.clamp(max=x.shape[0] - 1)  # padding past the last row has size 0
    if codes.scale is not None:
        sizes = sizes * sae.dictionary.shared(codes.scale)[rows]
    relative = sizes / _norms(x, sae.dictionary.offset).clamp(min=TINY)[rows]
    return relative.sum() / max(1, x.shape[0])


def l0(sae: SAE, stages: Encoded, target: float | None = None, ranks: Alone = ALONE) -> Tensor:
    """Scalar: mean number of active latents, or ``(L0 / target - 1)^2``, with a gradient for the thresholds.

    Raises:
        ConfigError: an activation whose L0 has no gradient.
    """
    count = sae.activation.count(stages.scores, stages.support)
    if count is None:
        raise ConfigError(f"the l0 penalty needs thresholds that learn (jumprelu), not {sae.activation.name!r}")
    mean = count.sum() / max(1, stages.support.offsets.numel() - 1)
    return mean if target is None else (mean_of_all(mean, ranks) / target - 1).square()


def prefixes(
    sae: SAE,
    x: Tensor,
    stages: Encoded,
    config: LossConfig,
    kernel_step: Step = DEFAULT,
    ranks: Alone = ALONE,
) -> Tensor:
    """Scalar: the mean of the reconstruction losses by the first ``m`` latents alone, over the sizes m.

    Raises:
        ConfigError: a size that is not below d_sae.
    """
    if config.prefixes[-1] >= sae.d_sae * ranks.latents:
        raise ConfigError(f"prefixes={config.prefixes}: each must be below d_sae={sae.d_sae * ranks.latents}")
    codes, before = stages.candidates, sae.d_sae * ranks.latent_rank
    losses = []
    for size in config.prefixes:
        first = codes.with_values(codes.values.masked_fill(codes.indices + before >= size, 0.0))
        recons = sae.decode(first, step=kernel_step)
        losses.append(reconstruction(x, recons, config.reconstruction, sae.dictionary.offset, ranks))
    return torch.stack(losses).mean()


def gate(sae: SAE, x: Tensor, stages: Encoded, kind: str, ranks: Alone = ALONE) -> Tensor:
    """Scalar: reconstruction loss of what opens the gates, relu(pi), through the detached decoder.

    Source: Rajamanoharan et al. 2024, arXiv:2404.16014, eq. 8.
    """
    opening = sae.activation.penalised(stages.scores, stages.support, stages.candidates.values)
    frozen = {name: parameter.detach() for name, parameter in sae.dictionary.named_parameters()}
    recons = functional_call(sae.dictionary, frozen, (stages.candidates.with_values(opening),))
    return reconstruction(x, recons, kind, sae.dictionary.offset, ranks)


def dead(idle: Tensor | None, config: LossConfig) -> Tensor | None:
    """(n,) int64 latents that have not fired for ``config.dead_after`` rows; None if the trainer does not count."""
    return None if idle is None else (idle >= config.dead_after).nonzero()[:, 0]


def under_used(sae: SAE, config: LossConfig, ranks: Alone = ALONE) -> Tensor:
    """(n,) int64 latents far below the density that the Zipf curve expects at their rank.

    The curve is fitted to the densities of the first half of the ranks. A latent counts once the curve expects it
    to have fired five times, so that chance alone does not name it; dead latents are the extreme case. These rules
    and the factor ``zipf_share`` are our reading of arXiv:2411.02124.

    Raises:
        ConfigError: the SAE does not track densities.
    """
    density = sae.density.mean
    if density is None:
        raise ConfigError("aux_zipf needs running densities: make the SAE with track_density=True")
    density = ranks.all_latents(density)
    expected = fit_zipf(density, head=0.5).at(density_ranks(density))
    few = (density < config.zipf_share * expected) & (expected * sae.density.rows >= 5)
    return ranks.own_latents(few).nonzero()[:, 0]


def auxiliary(
    sae: SAE,
    stages: Encoded,
    error: Tensor,
    latents: Tensor,
    k: int | None = None,
    weights: Tensor | None = None,
    kernel_step: Step = DEFAULT,
    ranks: Alone = ALONE,
) -> Tensor:
    """Scalar: how badly each row's k best of some latents reconstruct the error, 1 if not at all.

    Rows weigh as in the reconstruction loss: where a few tokens have a hundred times the norm of the others, a plain
    ratio of sums would be about those alone.

    Args:
        sae: in train mode.
        stages: of the rows.
        error: (rows, d_in) detached, x - recons.
        latents: (n,) int64 ascending.
        k: latents of a row; None for half of d_in.
        weights: (rows,) of the rows' squared errors; None for equal ones.
        kernel_step: what the kernels know beside the tensors.
        ranks: of which the mean is the loss.
    """
    k = min(k or max(1, sae.d_in // 2), sae.dictionary.total(latents.numel()))
    prepared = stages.prepared
    # How many there can be is known: a step that does not wait for its codes need not wait for these.
    step = kernel_step.with_room(max(1, error.shape[0] * k))
    with torch.no_grad():
        support = sae.dictionary.select(prepared, TopK(k), among=latents, step=step)
    values = sae.dictionary.scores(prepared, support, step=step).relu()
    shape = (error.shape[0],)
    codes = Codes(support.indices, values, support.offsets, shape, sae.d_sae, prepared.scale, support.pattern())
    missed = (sae.dictionary.decode(codes, with_offset=False, step=step) - error).square().sum(1)
    missing = error.square().sum(1)
    if weights is not None:
        missed, missing = missed * weights, missing * weights
    return missed.sum() / ranks.mean_over_rows(missing.sum()).clamp(min=TINY)
