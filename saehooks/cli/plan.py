"""The SAEs that ``saehooks fit`` was asked for: one by flags, or several by a TOML file."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from saehooks.cli.settings import given_settings
from saehooks.errors import ConfigError
from saehooks.training.losses import LossConfig, default_loss
from saehooks.training.trainer import TrainConfig


@dataclass(frozen=True)
class Plan:
    """One SAE to be made and trained. A table of the file has these names; others in it are settings of the SAE."""

    d_sae: int
    at: str | None = None
    head: int | None = None
    preset: str | None = None
    """One of `saehooks.presets.PRESETS`, in place of the two that follow."""
    dictionary: str | None = None
    """``"concepts"`` if neither this nor a preset is given."""
    activation: str | None = None
    """``"sparsemax"`` likewise."""
    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    """Of `TrainConfig`."""
    loss: dict[str, Any] = field(default_factory=dict)
    """Of `LossConfig`."""

    def make(self, d_in: int, device: Any) -> tuple[Any, TrainConfig]:
        """The SAE, at its site, and how it is trained."""
        import torch

        config = _made(TrainConfig, self.training)
        torch.manual_seed(config.seed)
        sae = self._sae(d_in).to(device)
        if self.at is not None:
            sae.cfg.metadata.update(hook_name=self.at, head=self.head)
        if self.loss:
            config = replace(config, loss=_made(LossConfig, self.loss, default_loss(sae)))
        return sae, config

    def _sae(self, d_in: int) -> Any:
        from saehooks.presets import PRESETS
        from saehooks.sae import SAE

        if self.preset is None:
            dictionary, activation = self.dictionary or "concepts", self.activation or "sparsemax"
            return SAE(d_in, self.d_sae, dictionary, activation, **self.settings)
        if self.dictionary or self.activation:
            raise ConfigError(f"the preset {self.preset} has a dictionary and an activation: leave out your own")
        if self.preset not in PRESETS:
            raise ConfigError(f"there is no preset {self.preset!r}; there are {', '.join(PRESETS)}")
        return PRESETS[self.preset](d_in, self.d_sae, **self.settings)


def plans(arguments: argparse.Namespace) -> dict[str, Plan]:
    """What a command was given: by the names in the file, or ``""`` for the one by flags.

    Raises:
        ConfigError: both or neither, or a file that does not say what it must.
    """
    flags = Plan(
        d_sae=arguments.d_sae or 0,
        at=arguments.at,
        head=arguments.head,
        preset=arguments.preset,
        dictionary=arguments.dictionary,
        activation=arguments.activation,
        settings=dict(setting(one) for one in arguments.set) | ({} if arguments.k is None else {"k": arguments.k}),
        training=given_settings(arguments, TrainConfig),
        loss=given_settings(arguments, LossConfig, "loss-"),
    )
    if arguments.saes is None:
        if arguments.d_sae is None:
            raise ConfigError("how large is the SAE? Write --d-sae N, or --saes FILE.toml for several")
        return {"": flags}
    if arguments.d_sae is not None:
        raise ConfigError("--saes FILE says how large each SAE is: leave out --d-sae")
    return {name: _of_table(f"{arguments.saes}, [{name}]", table, flags) for name, table in _tables(arguments.saes)}


def _tables(file: Path) -> list[tuple[str, dict[str, Any]]]:
    if sys.version_info < (3, 11):
        raise ConfigError("--saes needs Python 3.11 or later, which reads TOML")
    import tomllib

    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as TOML: {error}") from error
    if not found or not all(isinstance(table, dict) for table in found.values()):
        raise ConfigError(f"{file} must hold one table for each SAE, such as [small] with d_sae = 1024 under it")
    return list(found.items())


def _of_table(where: str, table: dict[str, Any], flags: Plan) -> Plan:
    """A plan of the file; what it does not say is as the flags do."""
    known = {one.name for one in fields(Plan)} - {"settings"}
    own = {name: value for name, value in table.items() if name in known}
    if not isinstance(own.get("d_sae"), int):
        raise ConfigError(f"{where} does not say how large the SAE is: write d_sae = 1024")
    merged = {name: getattr(flags, name) | own.pop(name, {}) for name in ("training", "loss")}
    others = {name: value for name, value in table.items() if name not in known}
    if "preset" in own:
        flags = replace(flags, dictionary=None, activation=None)
    elif "dictionary" in own or "activation" in own:
        flags = replace(flags, preset=None)
    return replace(flags, **own, **merged, settings=flags.settings | others)


def _made(kind: type, settings: dict[str, Any], start: Any = None) -> Any:
    unknown = sorted(set(settings) - {one.name for one in fields(kind)})
    if unknown:
        known = ", ".join(one.name for one in fields(kind))
        raise ConfigError(f"{kind.__name__} has no {', '.join(unknown)}; it has {known}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    return kind(**given) if start is None else replace(start, **given)


def setting(text: str) -> tuple[str, Any]:
    """``NAME=VALUE`` with the value as JSON where it is JSON, else as the word it is.

    >>> setting("alpha=1.5"), setting("values=weight"), setting("normalize=true")
    (('alpha', 1.5), ('values', 'weight'), ('normalize', True))
    """
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ConfigError(f"--set {text!r}: write NAME=VALUE, such as --set values=weight")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
