"""Every latent's effect at once, from gradients at the codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saehooks.causal.metric import Batch, Metric
from saehooks.causal.runs import Data, Inputs, Place, Run
from saehooks.codes import Codes
from saehooks.errors import ConfigError, NeverFiredError
from saehooks.hosts.frozen import frozen
from saehooks.show.progress import Bar
from saehooks.trace import Forward
from saehooks.training.signals import Interruptions


@dataclass(eq=False)
class Attribution:
    """Sums over the sequences seen, one entry for each latent of the SAE."""

    effect: Tensor
    """(d_sae,) float64: first-order estimate of the metric's change when the latent is ablated."""
    tokens: Tensor
    """(d_sae,) int64: positions where it was selected."""
    sequences: Tensor
    """(d_sae,) int64: sequences in which it was selected."""
    value: Tensor
    """(d_sae,) float64: sum of its activations."""
    clean: float = 0.0
    """Sum of the metric over sequences, nothing edited."""
    seen: int = 0
    """Sequences seen."""

    @property
    def mean_effect(self) -> Tensor:
        """(d_sae,) float64: the effect, the mean over sequences."""
        return self.effect / self.seen

    @property
    def mean_value(self) -> Tensor:
        """(d_sae,) float64: the mean activation where it was selected, 0 where it never was."""
        return self.value / self.tokens.clamp(min=1)


def attribute(
    place: Place, data: Data, metric: Metric, run: Run, steps: int | None, bar: Bar
) -> tuple[Attribution, bool]:
    """Sum the attribution of every latent over the data.

    Args:
        steps: points of the integrated gradients, between all latents ablated and none; None for the gradient at the
            clean run alone.
    Returns:
        (the sums, whether all of the data went in): an interrupt keeps what was summed, if anything was.
    """
    d_sae = place.sae.d_sae
    counts, zeros = torch.zeros(d_sae, dtype=torch.int64), torch.zeros(d_sae, dtype=torch.float64)
    sums = Attribution(zeros, counts, counts.clone(), zeros.clone())
    bar.start("attribution", len(data.batches))
    try:
        with Interruptions() as interruptions:
            for part in data.batches:
                with interruptions.held():
                    _add_batch(sums, place, data, part, metric, run, steps, interruptions)
                bar.step()
    except KeyboardInterrupt:
        if not sums.seen:
            raise
        return sums, False
    place.check_used()
    if not int(sums.tokens.sum()):
        raise NeverFiredError("no latent is selected anywhere in this data: nothing to rank")
    return sums, True


def _add_batch(
    sums: Attribution,
    place: Place,
    data: Data,
    part: Inputs,
    metric: Metric,
    run: Run,
    steps: int | None,
    interruptions: Interruptions,
) -> None:
    effect = torch.zeros_like(sums.effect)
    clean: Tensor | None = None
    # At the clean point the run is the clean run; a path of several points needs one run more for it.
    points = [1.0] if steps is None else [1.0, *((k + 0.5) / steps for k in range(steps))]
    for point in points:
        interruptions.check()
        edits = () if point == 1.0 else (_scaled(point),)
        with (
            frozen(place.host.model),
            place.attached(edits=edits, grads=True, rows=part.rows) as trace,
            torch.enable_grad(),
        ):
            output = run(part.inputs)
            batch = Batch(part.inputs, part.rows, data.total, output.detach() if clean is None else clean)
            values = metric(output, batch)
            passes = trace.forwards  # one for each time the site fired in this forward
            if clean is None:
                clean = batch.clean_output
                held = [one.codes.detach().where(one.mask) for one in passes]
                value = float(values.detach().sum())
                if steps is not None or not any(len(codes.indices) for codes in held):
                    continue
            grads = gradient(metric.name, values.sum(), passes)
        # The path runs over multiples of the clean codes, so its length is always theirs.
        for codes, grad, one in zip(held, grads, passes, strict=True):
            add_products(effect, codes, grad.where(one.mask), 1 / (len(points) - 1 or 1))
    sums.effect += effect
    sums.clean += value
    _count(sums, held, len(part.rows))


def add_products(effect: Tensor, codes: Codes, grad: Codes, weight: float) -> None:
    """Subtract ``weight * value * gradient`` from the ``effect`` (d_sae,) of each latent.

    Where the site fires several times in a forward, scaling its first codes can move the support of the later ones:
    only what is in both counts there.
    """
    if not torch.equal(codes.offsets, grad.offsets) or not torch.equal(codes.indices, grad.indices):
        codes, grad = in_both(codes, grad)
    effect.index_add_(0, grad.indices.cpu(), -(codes.values * grad.values).cpu().double() * weight)


def in_both(one: Codes, other: Codes) -> tuple[Codes, Codes]:
    """The entries of each whose row and latent the other has too."""
    keys = [codes.rows * codes.d_sae + codes.indices for codes in (one, other)]
    return one.keep(torch.isin(keys[0], keys[1])), other.keep(torch.isin(keys[1], keys[0]))


def _scaled(point: float) -> Callable[[Codes], Codes]:
    return lambda codes: codes.with_values(codes.values * point)


def gradient(name: str, total: Tensor, passes: Sequence[Forward], keep_graph: bool = False) -> list[Codes]:
    """Gradient of ``total`` (), one number, with respect to the latents each time the site fired.

    Raises:
        ConfigError: it does not depend on them.
    """
    if not total.requires_grad:
        raise ConfigError(
            f"metric {name} has no gradient: compute it from the model's output with torch, without .detach(), .item() "
            "or numpy, and not under torch.inference_mode"
        )
    values = [one.edited.values for one in passes]
    grads = torch.autograd.grad(total, values, retain_graph=keep_graph, allow_unused=True)
    if all(grad is None for grad in grads):
        site = passes[0].site
        raise ConfigError(f"metric {name} does not depend on '{site}': nothing flows from there to what it reads")
    filled = [torch.zeros_like(value) if grad is None else grad for value, grad in zip(values, grads, strict=True)]
    return [one.edited.with_values(grad).detach() for one, grad in zip(passes, filled, strict=True)]


def _count(sums: Attribution, held: Sequence[Codes], n: int) -> None:
    """Add how often and how strongly latents were selected in a batch of n sequences."""
    there = torch.zeros(n, sums.tokens.numel(), dtype=torch.bool)
    for codes in held:
        indices, values = codes.indices.cpu(), codes.values.cpu().double()
        sums.tokens.index_add_(0, indices, torch.ones_like(indices))
        sums.value.index_add_(0, indices, values)
        there[torch.div(codes.rows, codes.shape[1], rounding_mode="floor").cpu(), indices] = True
    sums.sequences += there.sum(0)
    sums.seen += n
