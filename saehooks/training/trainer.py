"""The trainer: rows of activations in, optimiser steps out. It knows no model; `train` brings the rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saehooks.errors import ConfigError, NotFiniteError
from saehooks.kernels import Forecast, Step, backend_for
from saehooks.metrics import ReconstructionMeter, nmse
from saehooks.precision import widened
from saehooks.ranks import Alone, all_codes
from saehooks.sae import SAE, autocast_off
from saehooks.streams import Fingerprint, Mark, ShuffleBuffer
from saehooks.training.losses import LossConfig, TrainingLoss, default_loss, training_loss
from saehooks.training.optimiser import TableAdam

SUMS = ("l1", "l0")
"""Terms of the loss that add up over latents."""


@dataclass(frozen=True)
class TrainConfig:
    """How an SAE is trained. Defaults suit activations of a language model on a laptop."""

    lr: float = 2e-3
    """Peak learning rate of Adam."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's running means."""
    batch_size: int = 1024
    """Rows (tokens or patches) in an optimiser step."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    decay: float = 0.3
    """Last share of the steps, over which the learning rate falls to 0; needs the number of steps to be known."""
    steps: int | None = None
    """Stop after this many optimiser steps; None: when the data ends."""
    passes: int = 1
    """How often a harvested row is used: the model's forward costs far more than a step."""
    buffer_rows: int = 32_768
    """Rows mixed by the shuffle buffer."""
    loss: LossConfig | None = None
    """Terms of the loss; None for those that go with the SAE's activation."""
    dead_after: int = 50_000
    """A latent counts as dead when it has not fired for this many rows."""
    log_every: int = 10
    """Steps between records in the history."""
    eval_every: int = 500
    """Steps between evaluations, when there are held-out batches."""
    checkpoint_every: int = 250
    """Steps between checkpoints, when there is a folder for them."""
    seed: int = 0
    """Order of the rows; on the command line also of the weights at the start."""

    def __post_init__(self) -> None:
        if not self.lr > 0 or not 0 <= self.decay <= 1 or self.warmup_steps < 0:
            raise ConfigError(
                f"need lr > 0, 0 <= decay <= 1 and warmup_steps >= 0, got lr={self.lr}, decay={self.decay}, "
                f"warmup_steps={self.warmup_steps}"
            )
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")


class Trainer:
    """Trains one SAE on rows of activations, whoever brings them.

    `step` takes a batch as it is; `push` mixes rows through the shuffle buffer and steps whenever a batch is ready.

    Args:
        sae: trained in place.
        config: settings.
        on_record: called with each record of the history as it is made; an evaluation comes as a record of its own
            with the same step. See `saehooks.training.watching` for TensorBoard, Weights & Biases and trackio.
        ranks: the processes that train together; then ``sae`` holds this one's latents.
    Raises:
        ConfigError: an SAE that cannot be trained: in float16, frozen, or made under inference_mode.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        sae: SAE,
        config: TrainConfig | None = None,
        on_record: Callable[[dict[str, Any]], None] | None = None,
        ranks: Alone | None = None,
    ) -> None:
        _check_trainable(sae)
        if on_record is not None and not callable(on_record):
            raise TypeError(f"on_record is called with each record, got {type(on_record).__name__}")
        self.ranks = ranks or Alone()
        self._on_record = on_record if self.ranks.leads else None
        self.sae, self.config = sae, config or TrainConfig()
        self.loss_config = self.config.loss or default_loss(sae)
        self.optimizer = TableAdam(sae, lr=self.config.lr, betas=self.config.betas)
        self.buffer = ShuffleBuffer(
            max(self.config.buffer_rows, 2 * self.config.batch_size),
            sae.d_in,
            self.config.batch_size,
            passes=self.config.passes,
            seed=self.config.seed,
            dtype=sae.dtype,
            device=sae.device,
        )
        self.expected_steps = self.config.steps
        """Steps of the whole training where they are known: what the learning rate's decay is measured by."""
        self.steps = 0
        """Optimiser steps made."""
        self.rows_done = 0
        """Rows of the batches taken in whole."""
        self.batches_seen = 0
        """Batches taken in whole."""
        self.data = Fingerprint()
        """Of those batches."""
        self.position: list | None = None
        """Where the last of them begins in its source, if the source says."""
        self.source = ""
        """What the batches come from, where they can be entered anywhere."""
        self.idle = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.device)
        """(d_sae,) rows trained on since each latent last fired."""
        self.history: list[dict[str, float]] = []
        """Records: step, rows, loss, nmse, l0, dead, lr; and eval_* where there was an evaluation."""
        self.seconds = {"model": 0.0, "sae": 0.0, "optimizer": 0.0, "buffer": 0.0}
        """Where the host's time went; on a GPU, which works on while the host goes ahead, not the GPU's."""
        self._bad = torch.zeros((), dtype=torch.float32, device=sae.device)
        self._forecast = Forecast()

    # ---------------------------------------------------------------- rows in

    @property
    def finished(self) -> bool:
        """Whether the configured number of steps has been made."""
        return self.config.steps is not None and self.steps >= self.config.steps

    @property
    def rows_seen(self) -> int:
        """Rows taken in."""
        return self.rows_done + self.buffer.under_way

    @property
    def mark(self) -> Mark:
        """How far the batches were read."""
        return Mark(self.batches_seen, self.data.value, self.data.last, self.source, self.position)

    def push(self, rows: Tensor, batch: Any = None, position: list | None = None) -> None:
        """Take in rows (n, d_in), of any dtype and device, and train on the batches that become ready.

        Args:
            rows: activations.
            batch: what they came from, for the fingerprint by which a resumed training knows its data again.
            position: where that begins in its source, if the source tells.
        Raises:
            NotFiniteError: an activation, or the loss, is NaN or infinite; the SAE is as after the last good step.
        """
        with self._own_modes():
            if not self._train(self.buffer.add(rows.detach().to(self.sae.device))):
                return  # the last step was made: the rest of the rows waits for a training that goes on from here
        self.rows_done += len(rows)
        self.batches_seen += 1
        self.data.add(batch)
        self.position = position

    def drain(self) -> None:
        """Train on what is left in the buffer."""
        with self._own_modes():
            self._train(self.buffer.drain())
            self.settle()

    def _train(self, batches: Iterator[Tensor]) -> bool:
        """Step through batches, making them booked as the buffer's time; False if the steps ended before they did."""
        while not self.finished:
            started = time.perf_counter()
            batch = next(batches, None)
            self.seconds["buffer"] += time.perf_counter() - started
            if batch is None:
                return True
            if not self.sae.finished:
                self.sae.initialise(self.buffer.rows[: self.buffer.filled])
            self.step(self.ranks.own(batch))
        self.settle()
        return False

    @contextmanager
    def _own_modes(self) -> Iterator[None]:
        """A user may call the model, or `fit`, under inference_mode or autocast: neither reaches the training."""
        with torch.inference_mode(False), autocast_off(self.sae.device):
            yield

    # ------------------------------------------------------------------ steps

    def step(self, x: Tensor) -> TrainingLoss:
        """One optimiser step on a batch (rows, d_in).

        On a GPU the host does not wait for it: code buffers are sized from earlier steps, NaN is looked for every
        ``log_every`` steps, and a batch that overflows its buffer changes nothing and is retried two steps later.
        Codes of exact length (relu, gated, jumprelu, feature choice, kron), a learned alpha, and losses that look for
        silent latents (aux_k, aux_zipf) still make it wait in each step.

        Raises:
            NotFiniteError: the loss is NaN or infinite; the parameters were not changed.
        """
        with self._own_modes():
            self._repeat(self._forecast.overflowed_batches())
            x = x.clone() if x.is_inference() else x
            loss = self._update(self._loss_of(x), len(x), ahead=x if backend_for(x).ASYNCHRONOUS else None)
            self._count(loss, x)
        return loss

    def step_down(self, loss_of: Callable[[Step], tuple[TrainingLoss, Tensor]], batch: Any = None) -> TrainingLoss:
        """One optimiser step down a loss that is computed elsewhere, such as behind the rest of a model.

        Args:
            loss_of: given what the kernels are to know, the loss and the rows (n, d_in) that the SAE was given.
            batch: what they came from, as for `push`.
        Raises:
            NotFiniteError: the loss is NaN or infinite; the parameters were not changed.
        """
        rows: list[Tensor] = []

        def kept(kernel_step: Step) -> TrainingLoss:
            loss, x = loss_of(kernel_step)
            rows.append(x)
            return loss

        with self._own_modes():
            loss = self._update(kept)
            self.rows_done += len(rows[0])
            self._count(loss, rows[0])
        self.batches_seen += 1
        self.data.add(batch)
        return loss

    def _loss_of(self, x: Tensor) -> Callable[[Step], TrainingLoss]:
        return lambda kernel_step: training_loss(
            self.sae, x, self.loss_config, idle=self.idle, step=self.steps, kernel_step=kernel_step, ranks=self.ranks
        )

    @property
    def repeated(self) -> int:
        """Steps made again because their codes outgrew the buffer sized from earlier steps (GPU only)."""
        return self._forecast.repeated

    def settle(self) -> None:
        """Wait for the device and make the steps again whose codes did not fit: afterwards every batch has counted."""
        self._repeat(self._forecast.overflowed_batches(everything=True))

    def _repeat(self, batches: list[Tensor]) -> None:
        for batch in batches:
            loss = self._update(self._loss_of(batch), len(batch))
            self.idle[loss.stages.codes.indices] = 0

    def _update(
        self, loss_of: Callable[[Step], TrainingLoss], rows: int = 0, ahead: Tensor | None = None
    ) -> TrainingLoss:
        """Forward, backward and the optimiser's update.

        Args:
            loss_of: the forward.
            rows: of the batch, where that is known before.
            ahead: the batch, so that it can be stepped on again: then this does not wait for the size of its codes.
        """
        started = time.perf_counter()
        self.sae.train()
        self.optimizer.zero_grad(set_to_none=True)
        statistics = [(buffer, buffer.clone()) for buffer in self.sae.buffers()]
        written = self.sae.dictionary.adjusts_gradients or self.ranks.data > 1
        room = None if ahead is None else self._forecast.capacity_for(rows, self.sae.d_sae)
        kernel_step = Step(capacity=room) if written else self.optimizer.kernel_step(room)
        with torch.enable_grad():
            loss = loss_of(kernel_step)
            loss.total.backward()
        self.ranks.average_gradients(self.sae)
        self._forecast.add(loss.stages.support.indices.numel(), room, loss.recons if ahead is None else ahead)
        # Adam's fused kernel leaves the parameters alone where found_inf is set, so a GPU need not be waited for.
        broken = self.ranks.any((~torch.isfinite(loss.total.detach())).to(self._bad))
        cut = torch.zeros_like(broken) if room is None or room.wanted is None else room.found_inf.to(broken)
        self._bad += broken * (1 - cut)  # codes that were cut off say nothing about the loss
        failed = torch.maximum(broken, cut)
        self.optimizer.found_inf = failed  # type: ignore[attr-defined]
        for buffer, before in statistics:  # a step that changes no parameter has not been seen by a running mean either
            buffer.copy_(torch.where(failed > 0, before, buffer))
        if ahead is None:
            self.check_finite()
        between = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self._lr_factor()
        self.sae.dictionary.after_backward()
        self.optimizer.step()
        self.sae.dictionary.after_step()
        self.seconds["sae"] += between - started
        self.seconds["optimizer"] += time.perf_counter() - between
        return loss

    def check_finite(self) -> None:
        """Raise NotFiniteError if a loss was NaN or infinite; such a step never changes the parameters."""
        if self._bad:
            self.optimizer.zero_grad(set_to_none=True)
            self._bad.zero_()
            raise NotFiniteError(
                f"the loss became NaN or infinite at step {self.steps + 1}; the SAE is as after the last good step. "
                "A smaller lr, or float32 activations, usually helps"
            )

    def expect(self, batches: int, rows: int) -> None:
        """Set `expected_steps` for so many batches in all, of as many rows as those so far; the next one has ``rows``.

        ``steps`` of the config stays the limit. Every batch corrects the estimate, so that one short batch at the
        beginning does not end the training's learning rate.
        """
        config, seen = self.config, self.rows_done + rows
        steps = batches * seen * config.passes // ((self.batches_seen + 1) * config.batch_size)
        self.expected_steps = max(1, steps if config.steps is None else min(steps, config.steps))

    @property
    def rate_fell(self) -> bool:
        """Whether the learning rate of the next step is below its peak by decay, or is not to decay at all."""
        risen = self.steps + 1 >= self.config.warmup_steps
        return not self.config.decay or (risen and self._lr_factor() < 1)

    def _lr_factor(self) -> float:
        step, total = self.steps + 1, self.expected_steps
        rise = min(1.0, step / max(1, self.config.warmup_steps))
        if not total or not self.config.decay:
            return rise
        left = max(1, total + 1 - step)  # where the number of steps was estimated too low, the rate never falls to 0
        return rise * min(1.0, left / max(1.0, self.config.decay * total))

    @torch.no_grad()
    def _count(self, loss: TrainingLoss, x: Tensor) -> None:
        codes = loss.stages.codes
        self.idle += len(x) * self.ranks.data
        self.idle[codes.indices] = 0
        self.ranks.least(self.idle)
        self.steps += 1
        if self.steps % self.config.log_every and not self.finished and self.steps > 1:
            return
        self.check_finite()
        record = {
            "step": self.steps,
            "rows": self.rows_seen,
            **self._losses(loss),
            "nmse": self._nmse(x, loss.recons),
            "l0": self.ranks.sum_latents(float(widened(codes.sizes).mean())),
            "dead": self.dead,
            "lr": self.optimizer.param_groups[0]["lr"],
            **{name: self.ranks.mean_rows(float(figure)) for name, figure in loss.figures.items()},
        }
        self.history.append(record)
        self._hand_on(record)

    @property
    def dead(self) -> int:
        """Latents that have not fired for ``config.dead_after`` rows."""
        return round(self.ranks.sum_latents(int((self.idle >= self.config.dead_after).sum())))

    def _nmse(self, x: Tensor, recons: Tensor) -> float:
        """Of the rows of all ranks."""
        own = nmse(x, recons)
        if self.ranks.data == 1:
            return own
        energy = float(widened(x).square().sum())
        return self.ranks.mean_rows(own * energy) / self.ranks.mean_rows(energy)

    def _losses(self, loss: TrainingLoss) -> dict[str, float]:
        """The loss and its terms: penalties are sums over latents, the others the same on ranks that share rows."""
        sums = SUMS if self.loss_config.l0_target is None else ("l1",)
        terms = {
            f"loss_{name}": (self.ranks.sum_latents if name in sums else self.ranks.mean_rows)(float(term))
            for name, term in loss.terms.items()
        }
        return {"loss": sum(terms.values()) if self.ranks.size > 1 else float(loss.total), **terms}

    @torch.no_grad()
    def evaluate(self, rows: Tensor, chunk: int = 4096) -> dict[str, float]:
        """NMSE, FVU, L0 with quantiles and dead latents on held-out rows (n, d_in); also put into the history."""
        meter = ReconstructionMeter(self.sae.d_in, self.sae.d_sae * self.ranks.latents)
        sae = self.sae.frozen()
        for part in rows.split(chunk):
            part = part.to(sae.device, sae.dtype)
            recons, codes = sae(part)
            meter.update(part, recons, all_codes(codes, self.ranks))
        found = meter.summary()
        record = {f"eval_{name}": value for name, value in found.items()}
        if self.history and self.history[-1]["step"] == self.steps:
            self.history[-1].update(record)
            self._hand_on({"step": self.steps, **record})
        else:
            self.history.append({"step": self.steps, "rows": self.rows_seen, **record})
            self._hand_on(self.history[-1])
        return found

    def _hand_on(self, record: dict[str, Any]) -> None:
        given = self._on_record
        self.ranks.agree(lambda: None if given is None else given(dict(record)))

    def latest(self, name: str) -> float | None:
        """The last recorded value of a column of the history."""
        return next((record[name] for record in reversed(self.history) if name in record), None)

    def __repr__(self) -> str:
        total = f"/{self.expected_steps}" if self.expected_steps else ""
        shown = [("loss", ".4f"), ("nmse", ".4f"), ("l0", ".1f"), ("dead", ".0f"), ("eval_nmse", ".4f")]
        values = [(name, self.latest(name), form) for name, form in shown]
        parts = "".join(f", {name} {value:{form}}" for name, value, form in values if value is not None)
        return f"Trainer(step {self.steps}{total}, {self.rows_seen} rows{parts})"

    def plot(self):
        """A figure of the history: loss, NMSE, L0 and dead latents over the steps (needs matplotlib)."""
        from saehooks.show.figures import training_curves

        names = [name for name in ("loss", "nmse", "l0", "dead", "eval_nmse") if self.latest(name) is not None]
        return training_curves(
            self.history, names, log=[name for name in ("loss", "nmse", "eval_nmse") if name in names]
        )

    def _repr_html_(self) -> str:
        from saehooks.show.html import table_html

        shown = [*self.history[:: max(1, len(self.history) // 6)], *self.history[-1:]]
        columns = [
            name for name in ("step", "rows", "loss", "nmse", "l0", "dead", "lr") if self.latest(name) is not None
        ]
        return table_html(shown, columns, caption=repr(self))


def _check_trainable(sae: SAE) -> None:
    """Raise ConfigError for an SAE whose parameters no optimiser can change."""
    if not isinstance(sae, SAE):
        raise ConfigError(
            f"a {type(sae).__name__} cannot be trained here: it predicts one site from another, and training brings "
            "the rows of one; load transcoders that others have trained"
        )
    if sae.dtype == torch.float16:
        raise ConfigError(
            "an SAE in float16 cannot be trained: squared gradients lie below the smallest float16, so that Adam "
            "divides by 0. Train in float32 (sae.float()), and save with sae.save(folder, dtype=torch.float16)"
        )
    if any(p.is_inference() for p in sae.parameters()):
        raise ConfigError(
            "the SAE's parameters were made under torch.inference_mode(), where nothing can be trained: "
            "move or cast the SAE outside of it"
        )
    if not any(p.requires_grad for p in sae.parameters()):
        raise ConfigError("all parameters of the SAE are frozen: write sae.requires_grad_(True) to train it")
