"""Training SAEs through the hooks by which they are used."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saehooks.attachments.resolve import find
from saehooks.errors import ConfigError, NeverFiredError, NotFiniteError, StorageError
from saehooks.hosts import Host, Site, host
from saehooks.sae import SAE
from saehooks.show.training import TrainingProgress
from saehooks.streams import AFTER_FIRST, Fingerprint, Tap, checked_batches, harvest
from saehooks.training.checkpoint import check_writable, load_checkpoint, refuse_unfinished, save_checkpoint
from saehooks.training.signals import Interruptions
from saehooks.training.trainer import TrainConfig, Trainer


@contextmanager
def train(
    model: Any,
    sae: SAE,
    at: str | None = None,
    *,
    head: int | None = None,
    where: Any = AFTER_FIRST,
    config: TrainConfig | None = None,
    **settings: Any,
) -> Iterator[Trainer]:
    """Train on what ordinary calls of the model bring past a site: ``with sh.train(model, new, at=...) as trainer:``.

    The model's outputs are untouched. On leaving the block normally, the rest of the buffer is trained on.

    Args:
        model: any model that saehooks knows.
        sae: trained in place.
        at: the site; the SAE's own if not given.
        head: one head of a per-head site.
        where: which positions; all but the first by default.
        config: settings; single ones may be given by name instead, such as ``lr=4e-4``.
    Raises:
        SiteError, WidthError: on entering, when the site does not exist or does not fit.
        NeverFiredError: on leaving, when no forward passed the site.
        ConfigError: on leaving, when fewer activations came than make one batch.
        NotFiniteError: from the model's call, when an activation or the loss is not finite.
    """
    source = host(model)
    site = find(source, sae, at, head)
    trainer = Trainer(sae, _config(config, settings))
    tap = Tap(source, site, lambda rows: None if trainer.finished else trainer.push(rows), where)
    with tap.attached():
        yield trainer
    if not tap.fired:
        raise NeverFiredError(f"no forward passed '{site.name}' inside the block, so nothing was trained")
    trainer.drain()
    _check_trained(trainer)
    _remember(trainer, source, site, where)


def fit(
    model: Any,
    sae: SAE,
    batches: Iterable[Any],
    at: str | None = None,
    *,
    head: int | None = None,
    where: Any = AFTER_FIRST,
    out: str | Path | None = None,
    resume: bool = False,
    eval_batches: Iterable[Any] | None = None,
    config: TrainConfig | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> Trainer:
    """Train an SAE on the activations of a site, stopping each forward there: ``sh.fit(model, new, batches, at=...)``.

    Args:
        model, sae, at, head, where, config, settings: as for `train`.
        batches: token tensors (batch, pos), images, or dicts of arguments. To resume, give the same ones again.
        out: folder for checkpoints while training and the SAE at the end. An interruption (Ctrl-C, SIGTERM) writes one
            more, between two steps, before it leaves; a second one leaves at once. A new training does not start in a
            folder that holds the checkpoint of an interrupted one.
        resume: go on from the checkpoint in ``out``, if there is one: bit for bit as if never interrupted (on CPU).
        eval_batches: held-out batches, evaluated every ``eval_every`` steps and at the end.
        progress: show a progress display; by default in a terminal or notebook.
    Returns:
        The trainer, with its history; the SAE is trained in place and left in eval mode.
    Raises:
        SiteError, WidthError, ConfigError: before anything runs; ConfigError also when the batches hold too little.
        NotFiniteError: an activation or the loss is not finite; the last checkpoint stays.
        StorageError: the folder cannot be written to, or the disk is full; the last checkpoint stays.
        KeyboardInterrupt: interrupted; the message says where the checkpoint is and how to go on.
    """
    source = host(model)
    site = find(source, sae, at, head)
    trainer = Trainer(sae, _config(config, settings))
    folder = None if out is None else Path(out)
    if resume and folder is None:
        raise ConfigError("resume=True needs out=, the folder that holds the checkpoint")
    if folder is not None:
        check_writable(folder)
    if folder is not None and resume:
        load_checkpoint(trainer, folder)
    elif folder is not None:
        refuse_unfinished(folder)
    batches = checked_batches(batches)
    held_out = None if eval_batches is None else _held_out(model, eval_batches, site, where)
    parts = _timed_parts(trainer, model, batches, site, where)
    try:
        with _saved_when_interrupted(trainer, folder) as interruptions:
            with TrainingProgress(trainer, progress) as display:
                _loop(trainer, parts, folder, held_out, display, interruptions)
            _remember(trainer, source, site, where)
            if held_out is not None:
                sae.cfg.metadata["metrics"] = {"held_out": trainer.evaluate(held_out)}
            if folder is not None:
                with _named_write(trainer, folder):
                    sae.save(folder)
                    save_checkpoint(trainer, folder)
    finally:
        sae.eval()
    return trainer


@contextmanager
def _saved_when_interrupted(trainer: Trainer, folder: Path | None) -> Iterator[Interruptions]:
    """An interruption inside waits until no step is half done, and leaves a checkpoint behind."""
    before = trainer.steps
    with Interruptions(wanted=folder is not None) as interruptions:
        trainer.buffer.before_batch = interruptions.check
        try:
            yield interruptions
        except KeyboardInterrupt:
            # After a second one a step may be half done; without a step there is nothing to save.
            if folder is None or interruptions.count != 1 or trainer.steps == before:
                raise
            with _named_write(trainer, folder):
                save_checkpoint(trainer, folder)
            raise KeyboardInterrupt(
                f"stopped after step {trainer.steps}, with a checkpoint in {folder}; the same call with resume=True "
                "(on the command line: --resume) goes on from there, bit for bit"
            ) from None
        finally:
            trainer.buffer.before_batch = None


def _loop(
    trainer: Trainer,
    parts: Iterator[Part],
    folder: Path | None,
    held_out: Tensor | None,
    display: TrainingProgress,
    interruptions: Interruptions,
) -> None:
    """Push rows until they end; evaluate and write checkpoints on the way."""
    saved = trainer.steps
    evaluated = max((record["step"] for record in trainer.history if "eval_nmse" in record), default=0)

    def after_push() -> None:
        nonlocal evaluated, saved
        if held_out is not None and trainer.steps - evaluated >= trainer.config.eval_every:
            trainer.evaluate(held_out)
            evaluated = trainer.steps
        if folder is not None and trainer.steps - saved >= trainer.config.checkpoint_every:
            with _named_write(trainer, folder):
                save_checkpoint(trainer, folder)
            saved = trainer.steps
        display.update()

    try:
        while not trainer.finished and (part := next(parts, None)) is not None:
            with interruptions.held():
                trainer.push(part.rows, part.batch)
                after_push()
    except NotFiniteError as error:
        kept = f"; the checkpoint of step {saved} in {folder} is intact" if folder and saved else ""
        raise NotFiniteError(f"{error}{kept}") from error
    if trainer.finished:
        return
    with interruptions.held():
        trainer.drain()
    _check_trained(trainer)
    if not trainer.finished and trainer.config.steps is not None:
        warnings.warn(
            f"the batches ended after step {trainer.steps}, before steps={trainer.config.steps}"
            + ("" if trainer.rate_fell else "; the learning rate had not fallen, since its decay was planned for that"),
            stacklevel=3,
        )
    trainer.expected_steps = trainer.steps
    display.update()


def _check_trained(trainer: Trainer) -> None:
    """Raise ConfigError where there was too little to make a single step."""
    if not trainer.rows_seen:
        raise ConfigError(
            "no activation came, so nothing was trained: there are no batches (a generator that was used up before?), "
            "or where= leaves out every position (by default the first; where=None takes all)"
        )
    if not trainer.steps:
        raise ConfigError(
            f"{trainer.rows_seen} activations do not fill a batch of {trainer.config.batch_size}, so nothing was "
            "trained: give more batches, or a smaller batch_size="
        )


def _held_out(model: Any, batches: Iterable[Any], site: Site, where: Any) -> Tensor:
    """(n, d_in) activations of the evaluation batches."""
    rows = list(harvest(model, checked_batches(batches), site.given, head=site.head, where=where))
    if not sum(map(len, rows)):
        raise ConfigError("eval_batches= gave no activation: it is empty, or a generator that was used up before")
    return torch.cat(rows)


class Part(NamedTuple):
    """What one batch gives."""

    rows: Tensor
    """(n, d_in) activations."""
    batch: Any
    """What the model was given."""


def _timed_parts(trainer: Trainer, model: Any, batches: Iterable[Any], site: Site, where: Any) -> Iterator[Part]:
    """Rows of the batches not seen yet, the time of the model's forwards booked as such."""
    latest: list[Any] = [None]

    def noted() -> Iterator[Any]:
        for latest[0] in _unseen(trainer, batches):
            yield latest[0]

    rows = harvest(model, noted(), site.given, head=site.head, where=where)
    total = _length(batches)
    while True:
        started = time.perf_counter()
        part = next(rows, None)
        trainer.seconds["model"] += time.perf_counter() - started
        if part is None:
            return
        if total is not None:
            trainer.expect(total, len(part))
        yield Part(part, latest[0])


def _unseen(trainer: Trainer, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches that a resumed training has not seen.

    Raises:
        ConfigError: those it has seen do not come again.
    """
    stream, again = iter(batches), Fingerprint()
    for count in range(trainer.batches_seen):
        try:
            again.add(next(stream))
        except StopIteration:
            raise ConfigError(
                f"there are {count} batches, but the checkpoint has seen {trainer.batches_seen}: "
                "to resume, give the batches of the first run"
            ) from None
    if again.value != trainer.data.value:
        raise ConfigError(
            f"the first {trainer.batches_seen} batches are not the same as those of the checkpoint: they are others, or "
            "came in another order. To resume, give the batches of the first run in their order (a DataLoader that "
            "shuffles needs generator=torch.Generator().manual_seed(...)), or begin anew in another folder"
        )
    return stream


def _length(batches: Iterable[Any]) -> int | None:
    """How many batches there are, where they can tell."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader over a stream has a length that only raises
        return None


@contextmanager
def _named_write(trainer: Trainer, folder: Path) -> Iterator[None]:
    """A write that fails says what was not written and what is left."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"step {trainer.steps} could not be saved in {folder} ({error.strerror or error}); what was there is as "
            "it was. The SAE goes on existing in this process: sae.save(another_folder)"
        ) from error


def _config(config: TrainConfig | None, settings: dict[str, Any]) -> TrainConfig:
    known = set(TrainConfig.__dataclass_fields__)
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError(f"unknown setting {', '.join(unknown)}; training takes {', '.join(sorted(known))}")
    return replace(config or TrainConfig(), **settings)


def _remember(trainer: Trainer, source: Host, site: Site, where: Any) -> None:
    """Write into the SAE where it belongs and how it was trained; leave it ready for use."""
    trainer.sae.eval()
    positions = "all but the first" if where is AFTER_FIRST else "all" if where is None else repr(where)
    settings = asdict(replace(trainer.config, loss=trainer.loss_config))
    trainer.sae.cfg.metadata.update(
        source.describe(),
        hook_name=site.name,
        head=site.head,
        training={**settings, "steps": trainer.steps, "rows": trainer.rows_seen, "positions": positions},
    )
