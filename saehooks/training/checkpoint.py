"""Checkpoints of a training: one file, replaced whole, from which training goes on bit for bit."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from saehooks.errors import ConfigError, FormatError, NotFiniteError, StorageError
from saehooks.ranks import axes_of, read_part, write_together
from saehooks.storage import CONFIG, WEIGHTS, open_safetensors, remove_abandoned
from saehooks.streams import Fingerprint, Mark
from saehooks.training.losses import LossConfig
from saehooks.training.trainer import TrainConfig, Trainer

CHECKPOINT = "checkpoint.safetensors"
FREE = ("steps", "log_every", "eval_every", "checkpoint_every", "dead_after")
"""Settings that may differ between a checkpoint and the training that goes on from it."""


def save_checkpoint(trainer: Trainer, folder: str | Path) -> Path:
    """Write the whole state of a training; killed at any moment, the file is the old one or the new.

    Raises:
        NotFiniteError: a parameter is NaN or infinite; the checkpoint that was there stays.
    """
    folder = Path(folder)
    trainer.settle()
    trainer.check_finite()
    ranks = trainer.ranks
    broken = [name for name, p in trainer.sae.named_parameters() if not torch.isfinite(p).all()]
    if ranks.any(torch.tensor(float(len(broken)), dtype=torch.float32, device=trainer.sae.device)):
        raise NotFiniteError(f"not saved: {', '.join(broken) or 'parameters of another rank'} hold NaN or infinity")
    tensors: dict[str, Tensor] = {f"sae.{name}": t for name, t in trainer.sae.state_dict().items()}
    for index, kept in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": value for name, value in kept.items()}
    tensors |= {f"buffer.{name}": value for name, value in trainer.buffer.state().items()}
    tensors["idle"] = trainer.idle
    facts = {
        "sae": _whole_config(trainer),
        "config": _settings(trainer),
        "counters": {name: getattr(trainer, name) for name in ("steps", "rows_done", "batches_seen", "expected_steps")},
        "data": trainer.mark._asdict(),
        "history": trainer.history,
        "seconds": trainer.seconds,
    }
    axes = _axes(trainer)
    own = {name: axis for name in tensors if (axis := axes(name)) is not None and tensors[name].dim()}
    write_together(folder / CHECKPOINT, tensors, own, {"cfg": json.dumps(facts)}, ranks, signed=False)
    return folder / CHECKPOINT


def _axes(trainer: Trainer) -> Callable[[str], int | None]:
    """Along which axis latents lie in a tensor of a checkpoint, by its name."""
    of, names = axes_of(trainer.sae), [name for name, _ in trainer.sae.named_parameters()]

    def axis(name: str) -> int | None:
        kind, _, rest = name.partition(".")
        if kind == "adam":
            index, _, key = rest.partition(".")
            return None if key == "step" else of.get(names[int(index)])
        return of.get(rest if kind == "sae" else name)

    return axis


def check_writable(folder: Path) -> None:
    """Raise before anything runs where a folder could not be written at the end.

    Raises:
        StorageError: it, or the nearest folder above it that exists, is a file or takes no files.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {nearest}: {error.strerror}; give another folder") from error


def remove_half_written(folder: Path) -> None:
    """Remove what a process that was killed while it wrote a checkpoint, or the SAE, left beside them."""
    for name in (CHECKPOINT, WEIGHTS, CONFIG):
        remove_abandoned(folder / name)


def refuse_unfinished(folder: str | Path) -> None:
    """Raise where a new training would write over the checkpoint of one that was interrupted.

    Raises:
        ConfigError: the folder holds such a checkpoint; says how to go on with it.
    """
    path = Path(folder) / CHECKPOINT
    try:
        facts = open_safetensors(path).config if path.exists() else None
    except FormatError:  # nothing could go on from it
        return
    counters = (facts or {}).get("counters")
    if counters and (counters["expected_steps"] is None or counters["steps"] < counters["expected_steps"]):
        raise ConfigError(
            f"{path} is of a training interrupted after step {counters['steps']}: resume=True (on the command line: "
            "--resume) goes on with it; to begin anew, give another folder or delete that file"
        )


def load_checkpoint(trainer: Trainer, folder: str | Path) -> bool:
    """Put a trainer into the state of the checkpoint in a folder; False when there is none.

    Raises:
        FormatError: the file is corrupt, or of another SAE or other settings; the trainer was not changed.
    """
    path = Path(folder) / CHECKPOINT
    if not path.exists():
        return False
    opened = open_safetensors(path)
    facts = opened.config
    if facts is None or not {"counters", "data"} <= set(facts):
        raise FormatError(f"{path} is not a checkpoint of a training")
    _check_same(f"{path}: the SAE", facts["sae"], _whole_config(trainer), ("metadata",))
    _check_same(f"{path}: the training", _with_newer(facts["config"]), _settings(trainer), FREE)
    tensors = read_part(opened, _axes(trainer), trainer.ranks)
    trainer.sae.load_state_dict(_part(tensors, "sae."))
    state: dict[int, dict[str, Tensor]] = {}
    parameters = list(trainer.sae.parameters())
    for name, value in _part(tensors, "adam.").items():
        index, key = name.split(".", 1)
        like = parameters[int(index)]
        if value.shape == like.shape:  # the fused update reads memory in order: the layout must be the parameter's
            value = torch.empty_like(like).copy_(value)
        state.setdefault(int(index), {})[key] = value
    trainer.optimizer.load_state_dict({"state": state, "param_groups": trainer.optimizer.state_dict()["param_groups"]})
    trainer.buffer.restore(_part(tensors, "buffer."))
    trainer.idle.copy_(tensors["idle"])
    for name, value in facts["counters"].items():
        setattr(trainer, name, value)
    trainer.expected_steps = trainer.config.steps or trainer.expected_steps
    mark = Mark(**facts["data"])
    trainer.data, trainer.source, trainer.position = Fingerprint(mark.value, mark.last), mark.source, mark.position
    trainer.history, trainer.seconds = facts["history"], facts["seconds"]
    return True


def _whole_config(trainer: Trainer) -> dict:
    """Of the SAE of all ranks."""
    cfg = trainer.sae.cfg
    return {**cfg.to_dict(), "d_sae": cfg.d_sae * trainer.ranks.latents}


def _settings(trainer: Trainer) -> dict:
    return asdict(trainer.config) | {"loss": asdict(trainer.loss_config)}


def _with_newer(saved: dict) -> dict:
    """The settings of a checkpoint; those that came after it was written are as they were without them."""
    loss = asdict(LossConfig()) | saved.get("loss", {})
    return asdict(TrainConfig()) | saved | {"loss": loss}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _check_same(what: str, saved: dict, now: dict, free: tuple[str, ...]) -> None:
    """Raise FormatError unless two dicts say the same, written out as JSON, but for the names that are free."""
    saved, now = (json.loads(json.dumps(one)) for one in (saved, now))
    different = [
        name for name in sorted(set(saved) | set(now)) if name not in free and saved.get(name) != now.get(name)
    ]
    if different:
        shown = "; ".join(f"{name}: saved {saved.get(name)!r}, now {now.get(name)!r}" for name in different)
        raise FormatError(f"{what} has other settings ({shown}); use the same, or another folder")
