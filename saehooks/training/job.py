"""One SAE in training: its trainer, its folder, its held-out rows. Several can read the same batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from saehooks.errors import ConfigError, NotFiniteError, StorageError
from saehooks.ranks import axes_of, whole
from saehooks.sae import SAE
from saehooks.training.checkpoint import (
    check_writable,
    load_checkpoint,
    refuse_unfinished,
    remove_half_written,
    save_checkpoint,
)
from saehooks.training.data import Part
from saehooks.training.trainer import Trainer


class Job:
    """A training from its start, or its checkpoint, to its end.

    Args:
        trainer: of the SAE.
        key: by which a `Part` holds its rows.
        folder: for checkpoints and the SAE; None for neither.
        resume: go on from the checkpoint in the folder, if there is one.
        sae: the whole SAE, where the trainer of this process has a part of it.
    Raises:
        ConfigError: resume without a folder, or a folder that holds an interrupted training and no resume.
        StorageError: a folder that cannot be written.
    """

    def __init__(
        self,
        trainer: Trainer,
        key: Hashable = None,
        folder: Path | None = None,
        resume: bool = False,
        sae: SAE | None = None,
    ) -> None:
        if resume and folder is None:
            raise ConfigError("resume=True needs out=, the folder that holds the checkpoint")
        self.trainer, self.key, self.folder = trainer, key, folder
        self.sae = trainer.sae if sae is None else sae
        self.held_out: Tensor | None = None
        if folder is not None:
            trainer.ranks.agree(lambda: self._open(folder, resume))
        self._began = self._saved = trainer.steps
        self._evaluated = max((record["step"] for record in trainer.history if "eval_nmse" in record), default=0)

    def _open(self, folder: Path, resume: bool) -> None:
        check_writable(folder)
        if self.trainer.ranks.leads:
            remove_half_written(folder)
        if resume:
            load_checkpoint(self.trainer, folder)
        else:
            refuse_unfinished(folder)

    @property
    def advanced(self) -> bool:
        """Whether a step was made that no checkpoint of an earlier process holds."""
        return self.trainer.steps > self._began

    def take(self, part: Part, batches: int | None) -> None:
        """Train on one batch's rows; evaluate and write a checkpoint where it is time.

        Args:
            part: of a batch that may have been seen before.
            batches: how many there are in all, where that is known.
        """
        trainer = self.trainer
        if trainer.finished or part.number < trainer.batches_seen:
            return
        rows = part.rows[self.key]
        if batches is not None:
            trainer.expect(batches, len(rows))
        try:
            trainer.push(rows, part.batch, part.position)
        except NotFiniteError as error:
            kept = f"; the checkpoint of step {self._saved} in {self.folder} is intact" if self._saved else ""
            raise NotFiniteError(f"{error}{kept if self.folder else ''}") from error
        if self.held_out is not None and trainer.steps - self._evaluated >= trainer.config.eval_every:
            trainer.evaluate(self.held_out)
            self._evaluated = trainer.steps
        if trainer.steps - self._saved >= trainer.config.checkpoint_every:
            self.save()

    def save(self) -> None:
        """Write a checkpoint, if there is a folder for it."""
        if self.folder is not None:
            with self._writing():
                save_checkpoint(self.trainer, self.folder)
            self._saved = self.trainer.steps

    def drain(self) -> None:
        """The batches have ended: train on what the buffer holds."""
        trainer = self.trainer
        if trainer.finished:
            return
        trainer.drain()
        check_trained(trainer)
        if not trainer.finished and trainer.config.steps is not None:
            said = "" if trainer.rate_fell else "; the learning rate had not fallen, its decay was planned for the last"
            warnings.warn(
                f"the batches ended after step {trainer.steps}, before steps={trainer.config.steps}{said}", stacklevel=4
            )
        trainer.expected_steps = trainer.steps

    def finish(self, remember: Callable[[Trainer], None]) -> None:
        """Write into the SAE what is known of it, evaluate it, and save it with its last checkpoint."""
        remember(self.trainer)
        part, ranks = self.trainer.sae, self.trainer.ranks
        if self.held_out is not None:
            part.cfg.metadata["metrics"] = {"held_out": self.trainer.evaluate(self.held_out)}
        if self.sae is not part:
            axes = axes_of(part)
            found = {name: whole(t, axes.get(name), ranks) for name, t in part.state_dict().items()}
            self.sae.load_state_dict(found)
            self.sae.cfg.metadata = part.cfg.metadata
        if self.folder is not None:
            folder = self.folder
            with self._writing():
                ranks.agree(lambda: self.sae.save(folder) if ranks.leads else None)
            self.save()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A write that fails says what was not written and what is left."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"step {self.trainer.steps} could not be saved in {self.folder} ({error.strerror or error}); what was "
                "there is as it was. The SAE goes on existing in this process: sae.save(another_folder)"
            ) from error


def check_trained(trainer: Trainer) -> None:
    """Raise ConfigError where there was too little to make a single step."""
    if not trainer.rows_seen:
        raise ConfigError(
            "no activation came, so nothing was trained: there are no batches (a generator that was used up before?), "
            "or where= leaves out every position (by default the first; where=sh.everywhere takes all)"
        )
    if not trainer.steps:
        raise ConfigError(
            f"{trainer.rows_seen} activations do not fill a batch of {trainer.config.batch_size}, so nothing was "
            "trained: give more batches, or a smaller batch_size="
        )
