"""Exact effects: latents, or sets of them, set to zero, many in one forward, from the site on.

Ablating changes only the sequences in which a latent is selected, and only what comes after the site. So the rows of
a forward are pairs of an ablation and a sequence that it touches, and earlier layers return what they returned before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saehooks import edits as edit
from saehooks.attachments import attach
from saehooks.causal.metric import Batch, Metric
from saehooks.causal.partial_forward import Prefix
from saehooks.causal.progress import Bar
from saehooks.causal.runs import Data, Inputs, rows_at_once
from saehooks.codes import Codes
from saehooks.hosts import Host, Site
from saehooks.sae import SAE


@dataclass(frozen=True, eq=False)
class Ablations:
    """What the metric became, for each ablation and sequence."""

    clean: Tensor
    """(sequences,) float64, nothing edited."""
    values: Tensor
    """(ablations, sequences) float64."""
    done: Tensor
    """(sequences,) bool: which were measured; all of them, unless interrupted."""
    rows_run: int
    """Edited sequences that went through the layers after the site."""
    resumed: bool
    """Whether the layers before the site were skipped."""

    @property
    def change(self) -> Tensor:
        """(ablations, sequences) float64, edited minus clean."""
        return self.values - self.clean


@dataclass(frozen=True, eq=False)
class Clean:
    """One batch as the unedited model runs it."""

    part: Inputs
    output: Tensor
    codes: Codes
    """Codes of shape (batch, pos), with the entries where nothing may be edited holding 0."""
    instead: Tensor | None
    """(batch, pos, d_in) what the site carries before latents are taken from it; None for what the model puts there."""
    prefix: Prefix | None


class Ablator:
    """Runs ablations on one model, SAE, site and metric.

    Args:
        place: ``at``, ``head`` and ``where`` of the attachment.
        error: ``"keep"``: taken from the activation; ``"drop"``: taken from the reconstruction.
        batch_size: edited sequences in a forward.
        resume: skip the layers before the site where that gives the same output.
    """

    def __init__(
        self,
        host: Host,
        site: Site,
        sae: SAE,
        metric: Metric,
        run: Callable[[Tensor], Tensor],
        place: dict[str, Any],
        *,
        error: str = "keep",
        batch_size: int | None = None,
        resume: bool = True,
    ) -> None:
        self.host, self.site, self.sae, self.metric, self.run = host, site, sae, metric, run
        self.place, self.error, self.batch_size, self.resume = place, error, batch_size, resume
        self._checked = False
        self.rows_run = 0

    def __call__(self, data: Data, table: Tensor, bar: Bar) -> Ablations:
        """Measure ablations on all of the data.

        Args:
            table: (ablations, d_sae) bool, the latents each one sets to zero.
        """
        clean = torch.full((data.total,), torch.nan, dtype=torch.float64)
        values = torch.full((len(table), data.total), torch.nan, dtype=torch.float64)
        bar.start("exact ablation", len(data.batches))
        try:
            for part in data.batches:
                now, changed = self._batch(data, part, table)
                clean[part.rows], values[:, part.rows] = now, changed
                bar.step()
        except KeyboardInterrupt:
            if bool(clean.isnan().all()):
                raise
        return Ablations(clean, values, ~clean.isnan(), self.rows_run, self.resume and self._checked)

    @torch.no_grad()
    def _batch(self, data: Data, part: Inputs, table: Tensor) -> tuple[Tensor, Tensor]:
        """(batch,) clean values, and (ablations, batch) edited ones."""
        run = self._clean(part)
        batch = Batch(part.inputs, part.rows, data.total, run.output)
        clean = self.metric(run.output, batch).double().cpu()
        changed = clean.expand(len(table), -1).clone()
        ablations, sequences = self._touched(run, table)
        size = self.batch_size or rows_at_once(tuple(part.inputs.shape[1:]))
        for start in range(0, len(ablations), size):
            which, rows = ablations[start : start + size], sequences[start : start + size]
            edited = Batch(part.inputs[rows], part.rows[rows], data.total, run.output, rows.to(run.output.device))
            changed[which, rows] = self.metric(self._rest(run, table, which, rows), edited).double().cpu()
            self.rows_run += len(rows)
        return clean, changed

    def _clean(self, part: Inputs) -> Clean:
        prefix = Prefix()
        with attach(self.host.model, self.sae, **self.place) as trace:
            if self.resume:
                with prefix.recording(self.host, self.site, len(part.rows)):
                    output = self.run(part.inputs)
            else:
                output = self.run(part.inputs)
        if self.resume and not self._checked:
            self.resume, self._checked = prefix.is_exact(self.run, part.inputs, output), True
        codes, instead = trace.codes, None
        if trace.mask is not None:
            inside = trace.mask.reshape(-1).to(codes.indices.device)[codes.rows]
            codes = codes.with_values(torch.where(inside, codes.values, 0.0))
        if self.error == "drop":
            instead = trace.recons.to(trace.acts)
            if trace.mask is not None:
                instead = torch.where(trace.mask.to(instead.device)[..., None], instead, trace.acts)
        return Clean(part, output, codes, instead, prefix if self.resume else None)

    def _touched(self, run: Clean, table: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs of an ablation and a sequence that it changes, (pairs,) each, by ablation."""
        if run.instead is not None:
            touched = torch.ones(len(table), len(run.part.rows), dtype=torch.bool)
        else:
            codes = run.codes
            held = codes.values != 0
            sequence = torch.div(codes.rows[held], codes.shape[1], rounding_mode="floor")
            there = torch.zeros(codes.shape[0], codes.d_sae, device=codes.indices.device)
            there[sequence, codes.indices[held]] = 1.0
            touched = (table.to(there).float() @ there.T > 0).cpu()
        ablations, sequences = touched.nonzero(as_tuple=True)
        return ablations, sequences

    def _rest(self, run: Clean, table: Tensor, which: Tensor, rows: Tensor) -> Tensor:
        """Output of a forward of the given sequences, each with the latents of its ablation set to zero."""
        moved, step = self._step(run, table, which, rows)

        def hook(acts: Tensor) -> Tensor:
            flat = (acts if run.instead is None else run.instead[rows.to(acts.device)]).reshape(-1, acts.shape[-1])
            places = moved.to(acts.device)
            wide = torch.promote_types(flat.dtype, step.dtype)
            new = (flat[places].to(wide) + step.to(acts.device, wide)).to(flat)
            return flat.index_copy(0, places, new).reshape(acts.shape)

        handle = self.site.hook(hook)
        try:
            if run.prefix is None:
                return self.run(run.part.inputs[rows])
            with run.prefix.resuming(rows):
                return self.run(run.part.inputs[rows])
        finally:
            handle.remove()

    def _step(self, run: Clean, table: Tensor, which: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) rows of the flattened batch that move, and (n, d_in) by how much."""
        batch, pos = len(rows), run.codes.shape[1]
        device = run.codes.indices.device
        flat = (rows.to(device)[:, None] * pos + torch.arange(pos, device=device)).reshape(-1)
        codes = run.codes.select_rows(flat, (batch, pos))
        ablation = which.to(device).repeat_interleave(pos)[codes.rows]
        zeroed = table.to(device)[ablation, codes.indices]
        delta = edit.without_zeros(codes.with_values(torch.where(zeroed, -codes.values, 0.0)))
        moved = (delta.sizes > 0).nonzero()[:, 0]
        return moved, self.sae.frozen().decode_delta(delta.select_rows(moved))
