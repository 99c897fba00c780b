"""Every latent's effect at once, from gradients at the codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saehooks.attachments import attach
from saehooks.causal.metric import Batch, Metric
from saehooks.causal.progress import Bar
from saehooks.causal.runs import Data, Inputs
from saehooks.codes import Codes
from saehooks.errors import ConfigError, NeverFiredError
from saehooks.hosts.frozen import frozen
from saehooks.sae import SAE
from saehooks.trace import Forward


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
    model: Any,
    sae: SAE,
    data: Data,
    metric: Metric,
    run: Callable[[Tensor], Tensor],
    place: dict[str, Any],
    steps: int | None,
    bar: Bar,
) -> tuple[Attribution, bool]:
    """Sum the attribution of every latent over the data.

    Args:
        place: ``at``, ``head`` and ``where`` of the attachment.
        steps: points of the integrated gradients, between all latents ablated and none; None for the gradient at the
            clean run alone.
    Returns:
        (the sums, whether all of the data went in): an interrupt keeps what was summed, if anything was.
    """
    counts, zeros = torch.zeros(sae.d_sae, dtype=torch.int64), torch.zeros(sae.d_sae, dtype=torch.float64)
    sums = Attribution(zeros, counts, counts.clone(), zeros.clone())
    bar.start("attribution", len(data.batches))
    try:
        for part in data.batches:
            _add_batch(sums, model, sae, data, part, metric, run, place, steps)
            bar.step()
    except KeyboardInterrupt:
        if not sums.seen:
            raise
        return sums, False
    if not int(sums.tokens.sum()):
        raise NeverFiredError("no latent is selected anywhere in this data: nothing to rank")
    return sums, True


def _add_batch(
    sums: Attribution,
    model: Any,
    sae: SAE,
    data: Data,
    part: Inputs,
    metric: Metric,
    run: Callable[[Tensor], Tensor],
    place: dict[str, Any],
    steps: int | None,
) -> None:
    effect = torch.zeros_like(sums.effect)
    clean: Tensor | None = None
    # At the clean point the run is the clean run; a path of several points needs one run more for it.
    points = [1.0] if steps is None else [1.0, *((k + 0.5) / steps for k in range(steps))]
    for point in points:
        edits = () if point == 1.0 else (_scaled(point),)
        with frozen(model), attach(model, sae, edits=edits, grads=True, **place) as trace, torch.enable_grad():
            output = run(part.inputs)
            batch = Batch(part.inputs, part.rows, data.total, output.detach() if clean is None else clean)
            values = metric(output, batch)
            if clean is None:
                clean = batch.clean_output
                codes = _inside(trace, trace.codes.detach())
                value = float(values.detach().sum())
                if steps is not None or not len(codes.indices):
                    continue
            grads = gradient(metric.name, values.sum(), trace)
        # The path runs over multiples of the clean codes, so its length is always theirs.
        grads = _inside(trace, grads)
        terms = -(codes.values * grads.values).double().cpu()
        effect.index_add_(0, grads.indices.cpu(), terms / (len(points) - 1 or 1))
    sums.effect += effect
    sums.clean += value
    _count(sums, codes, len(part.rows))


def _scaled(point: float) -> Callable[[Codes], Codes]:
    return lambda codes: codes.with_values(codes.values * point)


def gradient(name: str, total: Tensor, trace: Forward, keep_graph: bool = False) -> Codes:
    """Gradient of a number at the latents of a trace.

    Raises:
        ConfigError: it does not depend on them.
    """
    if not total.requires_grad:
        raise ConfigError(
            f"metric {name} has no gradient: compute it from the model's output with torch, without .detach(), .item() "
            "or numpy, and not under torch.inference_mode"
        )
    values = trace.edited.values
    (grad,) = torch.autograd.grad(total, values, retain_graph=keep_graph, allow_unused=True)
    if grad is None:
        raise ConfigError(f"metric {name} does not depend on '{trace.site}': nothing flows from there to what it reads")
    return trace.edited.with_values(grad).detach()


def _inside(trace: Forward, codes: Codes) -> Codes:
    """The entries where the attachment acts; the others hold 0 and are left out."""
    if trace.mask is None:
        return codes
    inside = trace.mask.reshape(-1).to(codes.indices.device)[codes.rows]
    sizes = torch.bincount(codes.rows[inside], minlength=codes.sizes.numel())
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return Codes(codes.indices[inside], codes.values[inside], offsets, codes.shape, codes.d_sae, codes.scale)


def _count(sums: Attribution, codes: Codes, n: int) -> None:
    """Add how often, where and how strongly latents were selected."""
    codes = codes.cpu()
    sums.tokens += codes.counts()
    in_sequence = torch.div(codes.rows, codes.shape[1], rounding_mode="floor")
    pairs = torch.unique(in_sequence * codes.d_sae + codes.indices)
    sums.sequences += torch.bincount(pairs % codes.d_sae, minlength=codes.d_sae)
    sums.value.index_add_(0, codes.indices, codes.values.double())
    sums.seen += n
