"""Exact effects: latents, or sets of them, set to zero, many in one forward, from the site on.

Ablating changes only the sequences in which a latent is selected, and only what comes after the site. So the rows of
a forward are pairs of an ablation and a sequence that it touches, and earlier layers return what they returned before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saehooks.causal.metric import Batch, Metric
from saehooks.causal.runs import Data, Inputs, Place, Run
from saehooks.codes import Codes
from saehooks.evaluation.batches import rows_at_once
from saehooks.hosts.partial_forward import CachedPrefix
from saehooks.show.progress import Bar
from saehooks.training.signals import Interruptions


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
    first: Codes
    """Codes of shape (batch, pos), of the first time the site fired."""
    mask: Tensor | None
    """(batch, pos) bool, where they may be edited; None for everywhere."""
    passes: tuple[Codes, ...]
    """What may be edited, each time the site fired: nothing outside ``where``."""
    prefix: CachedPrefix | None
    """None where every forward runs whole."""


class Ablator:
    """Runs ablations on one model, SAE, site and metric: what the block ``sh.ablate`` does, many in one forward.

    Args:
        error: ``"keep"``: taken from the activation; ``"drop"``: taken from the reconstruction.
        batch_size: edited sequences in a forward.
        resume: skip the layers before the site where that gives the same output.
    """

    def __init__(
        self,
        place: Place,
        metric: Metric,
        run: Run,
        *,
        error: Literal["keep", "drop"] = "keep",
        batch_size: int | None = None,
        resume: bool = True,
    ) -> None:
        self.place, self.metric, self.run = place, metric, run
        self.error, self.batch_size, self.resume = error, batch_size, resume
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
            with Interruptions() as interruptions:
                for part in data.batches:
                    with interruptions.held():
                        now, changed = self._batch(data, part, table, interruptions)
                        clean[part.rows], values[:, part.rows] = now, changed
                    bar.step()
        except KeyboardInterrupt:
            if bool(clean.isnan().all()):
                raise
        else:
            self.place.check_used()
        return Ablations(clean, values, ~clean.isnan(), self.rows_run, self.resume)

    @torch.no_grad()
    def _batch(self, data: Data, part: Inputs, table: Tensor, interruptions: Interruptions) -> tuple[Tensor, Tensor]:
        """(batch,) clean values, and (ablations, batch) edited ones."""
        run = self._clean(part)
        batch = Batch(part.inputs, part.rows, data.total, run.output)
        clean = self.metric(run.output, batch).cpu().double()
        changed = clean.expand(len(table), -1).clone()
        ablations, sequences = self._touched(run, table)
        size = self.batch_size or rows_at_once(tuple(part.inputs.shape[1:]))
        for start in range(0, len(ablations), size):
            interruptions.check()
            which, rows = ablations[start : start + size], sequences[start : start + size]
            edited = Batch(part.inputs[rows], part.rows[rows], data.total, run.output, rows.to(run.output.device))
            changed[which, rows] = self.metric(self._edited(run, table, which, rows), edited).cpu().double()
            self.rows_run += len(rows)
        return clean, changed

    def _clean(self, part: Inputs) -> Clean:
        prefix = CachedPrefix(self.place.host, self.place.site)
        with self.place.attached(rows=part.rows) as trace:
            if self.resume:
                with prefix.recording():
                    output = self.run(part.inputs)
            else:
                output = self.run(part.inputs)
        if self.resume:  # tried on every batch: what a tensor's axes mean can change with their sizes
            self.resume = prefix.separates_rows(self.run, part.inputs)
        passes = tuple(one.codes.where(one.mask) for one in trace.forwards)
        first = trace.forwards[0]
        return Clean(part, output, first.codes, first.mask, passes, prefix if self.resume else None)

    def _touched(self, run: Clean, table: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs of an ablation and a sequence that it changes, (pairs,) each, by ablation."""
        n = len(run.part.rows)
        if self.error == "drop":
            touched = torch.ones(len(table), n, dtype=torch.bool)
        else:
            there = torch.zeros(n, table.shape[1], device=run.first.indices.device)
            for codes in run.passes:
                held = codes.values != 0
                sequence = torch.div(codes.rows[held], codes.shape[1], rounding_mode="floor")
                there[sequence, codes.indices[held]] = 1.0
            touched = (table.to(there).float() @ there.T > 0).cpu()
        ablations, sequences = touched.nonzero(as_tuple=True)
        return ablations, sequences

    def _edited(self, run: Clean, table: Tensor, which: Tensor, rows: Tensor) -> Tensor:
        """Output of a forward of the given sequences, each with the latents of its ablation set to zero."""
        zeroed = table.to(run.first.indices.device)

        def zero(codes: Codes) -> Codes:
            ablation = which.to(zeroed.device).repeat_interleave(codes.shape[1])[codes.rows]
            return codes.with_values(torch.where(zeroed[ablation, codes.indices], 0.0, codes.values))

        # Nothing is edited before the site first fires, so its codes are then those of the clean run.
        pos = run.first.shape[1]
        places = rows[:, None] * pos + torch.arange(pos)
        codes = run.first.select_rows(places.reshape(-1).to(zeroed.device), (len(rows), pos))
        known = codes, None if run.mask is None else run.mask[rows.to(run.mask.device)]
        with self.place.attached((zero,), self.error, known=known, rows=run.part.rows[rows]):
            if run.prefix is None:
                return self.run(run.part.inputs[rows])
            with run.prefix.resuming(rows):
                return self.run(run.part.inputs[rows])
