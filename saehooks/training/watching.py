"""Following a training elsewhere: its records in TensorBoard, Weights & Biases or trackio.

Each function gives what ``on_record=`` of `fit`, `train` and `Trainer` takes, and imports its package only when it is
called. Runs begin with the first record: of several processes only the first one, which gets the records, makes one.
A resumed training goes on with the same step numbers, thus with the same curve.

>>> import torch
>>> seen = []
>>> from saehooks import SAE, TrainConfig, Trainer
>>> trainer = Trainer(SAE(8, 16), TrainConfig(batch_size=4), on_record=seen.append)
>>> _ = trainer.step(torch.randn(4, 8))
>>> seen[0]["step"], seen == trainer.history
(1, True)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from saehooks.errors import ConfigError

Record = Mapping[str, Any]
"""Columns of a history by name, ``step`` among them; ``sae`` is the name of one of several SAEs."""
OnRecord = Callable[[Record], None]


def tensorboard(folder: str | Path) -> OnRecord:
    """Scalars under ``folder``, to be seen with ``tensorboard --logdir folder``.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("following a training in TensorBoard needs it: pip install tensorboard") from error
    writers: dict[str, Any] = {}

    def on_record(record: Record) -> None:
        name = str(record.get("sae", ""))
        if name not in writers:
            writers[name] = SummaryWriter(str(Path(folder, name)))
        for column, value in figures(record).items():
            writers[name].add_scalar(column, value, record["step"])
        writers[name].flush()

    return on_record


def wandb(**settings: Any) -> OnRecord:
    """A run of Weights & Biases, made with ``wandb.init(**settings)``.

    To go on with the curve of an interrupted training give it the same ``id=`` and ``resume="allow"``.

    Raises:
        ConfigError: the package is not installed.
    """
    return _logged(_package("wandb"), settings)


def trackio(**settings: Any) -> OnRecord:
    """A run of trackio, made with ``trackio.init(**settings)``: ``project=`` at least.

    To go on with the curve of an interrupted training give it the same ``name=`` and ``resume="allow"``.

    Raises:
        ConfigError: the package is not installed.
    """
    return _logged(_package("trackio"), settings)


def _package(name: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(f"following a training in {name} needs it: pip install {name}") from error


def _logged(package: ModuleType, settings: dict[str, Any]) -> OnRecord:
    runs: list[Any] = []

    def on_record(record: Record) -> None:
        if not runs:
            runs.append(package.init(**settings))
        prefix = f"{record['sae']}/" if "sae" in record else ""
        runs[0].log({f"{prefix}{column}": value for column, value in figures(record).items()}, step=record["step"])

    return on_record


def figures(record: Record) -> dict[str, float]:
    """The columns of a record that are drawn over the steps."""
    return {name: float(value) for name, value in record.items() if name not in ("step", "sae")}
