"""Models left in train mode, where dropout makes outputs random and a forward updates batch norms."""

from __future__ import annotations

import warnings
from numbers import Real

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def warn_in_train_mode(model: nn.Module, what: str, stacklevel: int = 3) -> None:
    """Warn when part of a model is in train mode and therefore draws random numbers, or updates statistics.

    Args:
        what: what is being done, such as ``measure``.
    """
    found = next((name for module in model.modules() if (name := unsettled(module)) is not None), None)
    if found is not None:
        warnings.warn(
            f"{what} on a model in train mode: its {found} makes every forward another one; call model.eval() first",
            stacklevel=stacklevel + 1,
        )


def unsettled(module: nn.Module) -> str | None:
    """The dropout that is at work in a module itself, or the batch norm whose statistics it updates; else None."""
    if not module.training:
        return None
    name = type(module).__name__
    if isinstance(module, _BatchNorm):
        return name if module.track_running_stats else None
    rates = {key: value for key, value in vars(module).items() if _is_rate(value)}
    if "drop" in name.lower() or "stochastic" in name.lower():  # p, prob or drop_prob
        return f"{name}({max(rates.values()):g})" if rates else None
    return next((f"{key}={value:g} of {name}" for key, value in rates.items() if "drop" in key.lower()), None)


def _is_rate(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) <= 1
