"""Reading tensors out of pickles without running anything in them.

Admitted are tensors, plain containers, and the few constructors torch needs to rebuild a tensor. A class of anything
else (a config object, say) becomes a `Plain` holding its attributes: its code is never imported, let alone run.
"""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from saehooks.errors import FormatError

ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.storage", "_load_from_bytes"): lambda data: torch.load(io.BytesIO(data), weights_only=True),
    ("torch", "device"): torch.device,
    ("torch", "Size"): torch.Size,
}
STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
ADMITTED |= {("torch", f"{kind}Storage"): getattr(torch, f"{kind}Storage") for kind in STORAGES}


class Plain:
    """Stands in for an object of a class that was not imported: its attributes, nothing of its behaviour."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.given = args

    def __setstate__(self, state: Any) -> None:
        # A class without a dict, or with slots, has a state that is no mapping: it is kept as it is.
        attributes = state[1] or state[0] if isinstance(state, tuple) and len(state) == 2 else state
        if isinstance(attributes, dict):
            self.__dict__.update({str(name): value for name, value in attributes.items()})
        else:
            self.given = (*self.given, state)


class Inert(pickle.Unpickler):
    """An unpickler that admits tensors and plain values alone."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ADMITTED:
            return ADMITTED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name, (Plain,), {"module": module})


_INERT = ModuleType("inert_pickle")
_INERT.Unpickler = Inert  # type: ignore[attr-defined]
_INERT.load = lambda file, **kwargs: Inert(file, **kwargs).load()  # type: ignore[attr-defined]


def read_pickle(path: str | Path) -> Any:
    """What a ``.pt``, ``.pkl`` or ``.pkl.gz`` file holds, on the CPU.

    Raises:
        FormatError: no such file, or not readable.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"no file {path}")
    try:
        if zipfile.is_zipfile(path):
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_INERT)
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return Inert(io.BytesIO(data)).load()
    except FormatError:
        raise
    except Exception as error:
        raise FormatError(f"{path} is not a readable pickle of tensors ({type(error).__name__}: {error})") from error


def attributes_of(found: Any) -> dict[str, Any]:
    """The settings of a config that was a dict or an object."""
    values = found if isinstance(found, dict) else vars(found) if hasattr(found, "__dict__") else {}
    return {name: value for name, value in values.items() if isinstance(value, str | int | float | bool)}
