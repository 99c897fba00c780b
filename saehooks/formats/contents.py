"""The contents of a file, all of which must be understood: what no reader took is an error that names it.

Every reader takes the tensors and settings that it knows. A setting that changes the mathematics in a way that the
reader does not follow may only have its neutral value; settings of the training are named as such, in lists that follow
the libraries' sources. There is no third kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from saehooks.errors import FormatError
from saehooks.formats.pickles import plain
from saehooks.storage import StoredTensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Value = TypeVar("Value")
REQUIRED: Any = object()


class Contents:
    """The settings and tensors of one file, taken one after the other.

    Args:
        where: the file, for errors.
        settings: what its config says.
        tensors: what it holds, not read yet.
        ignore: names of settings and tensors that the user knows to change nothing.
    """

    def __init__(
        self,
        where: str,
        settings: Mapping[str, Any] | None = None,
        tensors: Mapping[str, StoredTensor] | None = None,
        ignore: Iterable[str] = (),
    ) -> None:
        self.where = where
        ignored = set(ignore)
        self._settings = {name: plain(v) for name, v in (settings or {}).items() if name not in ignored}
        self._tensors = {name: tensor for name, tensor in (tensors or {}).items() if name not in ignored}
        self._names = sorted(map(str, self._tensors))
        self._sizes: dict[str, tuple[int, str]] = {}
        self.ignored = ignored

    # ---------------------------------------------------------------- settings

    def setting(self, name: str, kind: type[Value] | tuple[type, ...], default: Any = REQUIRED) -> Value:
        """Take a setting of a type; None counts as left out.

        Raises:
            FormatError: it is missing and has no default, or is of another type.
        """
        value = self._settings.pop(name, None)
        if value is None:
            if default is REQUIRED:
                raise FormatError(f"{self.where}: its config does not say {name}")
            return default
        return self.check(name, value, kind)

    def check(self, name: str, value: Any, kind: Any) -> Any:
        """A value, if it is of a type; a whole number may stand for a float, True for no number."""
        kinds = kind if isinstance(kind, tuple) else (kind,)
        accepted = (*kinds, int) if float in kinds else kinds
        wrong_bool = isinstance(value, bool) and bool not in kinds
        if not isinstance(value, accepted) or wrong_bool or (isinstance(value, float) and not math.isfinite(value)):
            expected = " or ".join(one.__name__ for one in kinds)
            raise FormatError(f"{self.where}: {name} is {value!r:.80}, expected a {expected}")
        return value

    def one_of(self, name: str, choices: Iterable[Any], default: Any = REQUIRED) -> Any:
        """Take a setting that must have one of some values; the error names the others."""
        value = self._settings.pop(name, None)
        if value is None:
            if default is REQUIRED:
                raise FormatError(f"{self.where}: its config does not say {name}")
            return default
        listed = list(choices)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in listed):
            known = ", ".join(repr(one) for one in listed)
            raise FormatError(f"{self.where}: {name}={value!r:.80} is not read; what is: {known}")
        return value

    def neutral(self, **values: Any) -> None:
        """Take settings that would change the numbers if they had another value than the given one, or one of these."""
        for name, value in values.items():
            self.one_of(name, value if isinstance(value, tuple) else (value,), None)

    def group(self, name: str, default: Any = REQUIRED) -> dict[str, Any]:
        """Take a setting that is itself a mapping of settings."""
        return dict(self.setting(name, dict, default))

    def has(self, name: str) -> bool:
        """Whether a setting of this name is there and not taken yet."""
        return self._settings.get(name) is not None

    def known(self, *names: str) -> dict[str, Any]:
        """Take settings that are facts about the training and change no number; those that are there are returned."""
        listed = {name for text in names for name in text.split()}
        return {name: self._settings.pop(name) for name in listed if name in self._settings}

    # ----------------------------------------------------------------- tensors

    def holds(self, name: str) -> bool:
        """Whether a tensor of this name is there and not taken yet."""
        return name in self._tensors

    def tensor(self, name: str, *sizes: str | int) -> StoredTensor:
        """Take a tensor; the same word for two sizes means that they must be equal.

        Raises:
            FormatError: it is missing, or of another shape.
        """
        if name not in self._tensors:
            raise FormatError(f"{self.where}: no {name}; found {', '.join(self._names) or 'no tensor'}")
        found = self._tensors.pop(name)
        if not isinstance(found, StoredTensor):
            raise FormatError(f"{self.where}: {name} is a {type(found).__name__}, expected a tensor")
        if sizes and found.dtype not in FLOATS:
            raise FormatError(f"{self.where}: {name} holds {str(found.dtype)[6:]} numbers, which no weights are")
        if len(found.shape) != len(sizes):
            raise FormatError(f"{self.where}: {name} has the shape {found.shape}, expected {len(sizes)} axes")
        for size, axis in zip(found.shape, sizes, strict=True):
            self.size(axis, size, f"{name} {found.shape}")
        return found

    def size(self, axis: str | int, size: int, said_by: str) -> None:
        """Note how long an axis is; all that speak of it must agree.

        Raises:
            FormatError: something said otherwise before.
        """
        if isinstance(axis, int):
            known, other = axis, "one number for each latent" if axis != 1 else "one number"
        else:
            known, other = self._sizes.setdefault(axis, (size, said_by))
        if size != known:
            raise FormatError(f"{self.where}: {said_by} and {other} do not fit: {axis} is {size} or {known}")
        if size < 1:
            raise FormatError(f"{self.where}: {said_by} is empty")

    def skip(self, *names: str) -> None:
        """Take tensors that are statistics of the training and change no number, if they are there."""
        for text in names:
            for name in text.split():
                self._tensors.pop(name, None)

    # --------------------------------------------------------------------- end

    def finish(self) -> None:
        """Raise an error for settings and tensors that no reader took.

        Raises:
            FormatError: it names the tensors and settings that are left.
        """
        tensors = sorted(map(str, self._tensors))
        settings = sorted(f"{n}={value!r:.40}" for n, value in self._settings.items() if not _says_nothing(value))
        if not tensors and not settings:
            return
        parts = [f"the tensor {', '.join(tensors)}"] if tensors else []
        parts += [f"the setting {', '.join(settings)}"] if settings else []
        first = tensors[0] if tensors else settings[0].split("=")[0]
        raise FormatError(
            f"{self.where} holds {' and '.join(parts)}, which nothing is known of and which may change the numbers, so "
            f"it is not read. Where you know that it changes nothing, pass ignore=[{first!r}]"
        )


def _says_nothing(value: Any) -> bool:
    """Whether a setting is left out in all but name."""
    return value is None or (isinstance(value, (dict, list, tuple, str)) and not value)


def stored(tensor: Tensor) -> StoredTensor:
    """A tensor in memory, of any shape, with the interface of one in a file."""
    return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)
