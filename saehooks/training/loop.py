"""The loop of one training or several: batches in, checkpoints and progress on the way, interruptions between steps."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from saehooks.training.data import Data
from saehooks.training.job import Job
from saehooks.training.signals import Interruptions
from saehooks.training.trainer import Trainer

if TYPE_CHECKING:
    from saehooks.show.training import TrainingProgress


def run_jobs(
    jobs: Mapping[str, Job], data: Data, progress: bool | None, remember: Mapping[str, Callable[[Trainer], None]]
) -> None:
    """Train until the batches or the steps end, then save.

    Args:
        jobs: by name; all read the same batches.
        data: the batches.
        progress: as for `fit`.
        remember: for each job, writes into its SAE what is known of it.
    """
    from saehooks.show.training import TrainingProgress  # it imports rich

    try:
        with _saved_when_interrupted(jobs) as interruptions:
            shown = {name: job.trainer for name, job in jobs.items()}
            leads = all(trainer.ranks.leads for trainer in shown.values())
            with TrainingProgress(shown, progress if leads else False) as display:
                _read(jobs, data, display, interruptions)
            for name, job in jobs.items():
                job.finish(remember[name])
    finally:
        for job in jobs.values():
            job.trainer.sae.eval()
            job.sae.eval()


def _read(jobs: Mapping[str, Job], data: Data, display: TrainingProgress, interruptions: Interruptions) -> None:
    """Give every batch to every job."""
    try:
        total = len(data)
    except TypeError:
        total = None
    trainers = [job.trainer for job in jobs.values()]
    if total is None and any(trainer.config.steps is None and trainer.config.decay for trainer in trainers):
        warnings.warn(
            "the batches have no length and steps= is not given, so the learning rate will not fall: give steps=",
            stacklevel=5,
        )
    for trainer in trainers:
        trainer.source = trainer.source or data.identity
    parts = data.parts([trainer.mark for trainer in trainers])
    while not all(trainer.finished for trainer in trainers):
        started = time.perf_counter()
        part = next(parts, None)
        for trainer in trainers:
            trainer.seconds["model"] += time.perf_counter() - started
        if part is None:
            break
        with interruptions.held():
            for job in jobs.values():
                job.take(part, total)
            display.update()
    with interruptions.held():
        for job in jobs.values():
            job.drain()
        display.update()


@contextmanager
def _saved_when_interrupted(jobs: Mapping[str, Job]) -> Iterator[Interruptions]:
    """An interruption inside waits until no step is half done, and leaves checkpoints behind."""
    kept = [job for job in jobs.values() if job.folder is not None]
    with Interruptions(wanted=bool(kept)) as interruptions:
        for job in jobs.values():
            job.trainer.buffer.before_batch = interruptions.check
        try:
            yield interruptions
        except KeyboardInterrupt:
            # After a second one a step may be half done; without a step there is nothing to save.
            advanced = [job for job in kept if job.advanced]
            together = any(job.trainer.ranks.size > 1 for job in advanced)  # the others may be in another step
            if interruptions.count != 1 or not advanced or together:
                raise
            for job in advanced:
                job.save()
            steps = ", ".join(str(job.trainer.steps) for job in advanced)
            folders = ", ".join(str(job.folder) for job in advanced)
            raise KeyboardInterrupt(
                f"stopped after step {steps}, with a checkpoint in {folders}; the same call with resume=True "
                "(on the command line: --resume) goes on from there, bit for bit"
            ) from None
        finally:
            for job in jobs.values():
                job.trainer.buffer.before_batch = None
