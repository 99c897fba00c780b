"""The config that rebuilds an SAE or a transcoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from saehooks.answers import no_attribute
from saehooks.errors import FormatError

FORMAT = "saehooks"
METADATA: dict[str, type] = {
    "hook_name": str,
    "hook_name_out": str,
    "model_name": str,
    "head": int,
    "processing": dict,
}
"""What the code reads of an SAE's metadata; the rest is kept as it is."""


@dataclass
class SAEConfig:
    """What rebuilds an SAE, and what is known about it."""

    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of latents."""
    dictionary: str = "concepts"
    """A key of `saehooks.dictionaries.DICTIONARIES`."""
    activation: str = "sparsemax"
    """A key of `saehooks.activations.ACTIVATIONS`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the two, by name."""
    dtype: str = "float32"
    """What the SAE computes in; its file may hold fewer bits."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """hook_name, head, model_name, family, processing, training, metrics: whatever is known."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("hook_"):
            raise no_attribute(self, name, {name: "write sae.hook_name, or cfg.metadata"})
        if "settings" in self.__dict__ and (name in self.settings or name in self.metadata):
            where = "settings" if name in self.settings else "metadata"
            raise no_attribute(self, name, {name: f"write cfg.{where}[{name!r}]"})
        raise no_attribute(self, name, {})

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> SAEConfig:
        """Read back `to_dict`.

        Raises:
            FormatError: a setting is missing or unknown.
        """
        known = {name: value for name, value in found.items() if name not in ("format", "format_version")}
        try:
            config = cls(**known)
        except TypeError as error:
            raise FormatError(f"the config is not one of an SAE: {error}") from error
        numbers, texts, groups = ("d_in", "d_sae"), ("dictionary", "activation", "dtype"), ("settings", "metadata")
        for own, names in ((int, numbers), (str, texts), (dict, groups)):
            for name in names:
                _check_type(name, getattr(config, name), own)
        for name, kind in METADATA.items():
            if config.metadata.get(name) is not None:
                _check_type(f"metadata {name}", config.metadata[name], kind)
        return config


def _check_type(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(f"the config is not one of an SAE: {name} is {value!r}, expected a {kind.__name__}")
