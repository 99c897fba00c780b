"""Running only what comes after a site: what ran before it is remembered once, and handed out again.

It works for any model: whichever module calls had ended when the site first fired, outermost ones first, return what
they returned, whole or for chosen rows of the batch; the model's own code around them runs as usual.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saehooks.hosts.base import Host
from saehooks.hosts.method_wrapper import replaced_method
from saehooks.hosts.site import Site
from saehooks.precision import widened

ROUNDING = 512
"""Largest difference between a resumed forward and a whole one, in units of the dtype's rounding of the largest
output; never more than 5%."""

PLAIN = (type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device)
"""What a module may return beside tensors without being bound to the rows of the batch."""


class _Call(NamedTuple):
    """One module call that ended before the site."""

    module: nn.Module
    output: Any
    versions: tuple[int, ...]
    """How often each tensor in the output had been written to by then; empty where torch does not count."""


class _Rows(NamedTuple):
    """Where a tensor has the rows of the batch."""

    axis: int
    block: int
    """Neighbours on the axis that belong to one row: more than 1 where batch and positions share it."""


class _BoundToBatch(Exception):
    """An output whose rows are not known."""


class CachedPrefix:
    """What ran before a site in one forward."""

    def __init__(self, host: Host, site: Site) -> None:
        self.host, self.site = host, site
        self._calls: list[_Call] = []
        self._rows: list[list[_Rows | None]] = []
        self._reached = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember, inside the block, one forward up to the site."""
        with ExitStack() as stack:
            for module in self.host.model.modules():
                if module is not self.host.model:
                    stack.enter_context(replaced_method(module, "forward", self._recorder(module)))
            stack.callback(self.site.hook(self._at_site).remove)
            yield

    def _at_site(self, acts: Tensor) -> None:
        self._reached = True

    def _recorder(self, module: nn.Module) -> Callable[[Callable[..., Any]], Any]:
        def around(forward: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(forward)
            def recorded(*args: Any, **kwargs: Any) -> Any:
                before = len(self._calls)
                output = forward(*args, **kwargs)
                if not self._reached:
                    del self._calls[before:]  # the calls inside this one are part of it
                    self._calls.append(_remembered(module, output))
                return output

            return recorded

        return around

    @property
    def usable(self) -> bool:
        """Whether the site was reached, and nothing has written over what is remembered."""
        return self._reached and all(_versions(call.output) == call.versions for call in self._calls)

    def forget(self) -> None:
        """Free what is remembered."""
        self._calls, self._reached = [], False

    @contextmanager
    def resuming(self, rows: Tensor | None = None) -> Iterator[None]:
        """Inside the block, one forward starts at the site.

        Args:
            rows: (n,) int64, the rows of the remembered batch it is about, after `separates_rows`; a row may come
                many times. None for the very same batch.
        """
        queues: dict[nn.Module, deque[tuple[Any, Any]]] = {}
        for i, call in enumerate(self._calls):
            queues.setdefault(call.module, deque()).append((call.output, self._rows[i] if self._rows else None))
        with ExitStack() as stack:
            for module, queue in queues.items():
                stack.enter_context(replaced_method(module, "forward", _resumer(queue, rows)))
            yield

    def separates_rows(self, run: Callable[[Tensor], Tensor], inputs: Tensor) -> bool:
        """Whether resuming with some rows gives what a whole forward of them gives.

        A few rows are run whole, in another order and number: that shows which axis of each remembered tensor is the
        batch. Then they are run resumed, and both outputs are compared.

        Args:
            inputs: what was run while recording, rows first.
        """
        rows = torch.tensor([len(inputs) - 1, 0] if len(inputs) != 2 else [1, 0, 1])
        few = CachedPrefix(self.host, self.site)
        with torch.no_grad(), few.recording():
            whole = run(inputs[rows])
        if not self.usable or not few.usable or [c.module for c in self._calls] != [c.module for c in few._calls]:
            return False
        try:
            self._rows = [
                _rows_of_leaves(mine.output, other.output, len(inputs), len(rows))
                for mine, other in zip(self._calls, few._calls, strict=True)
            ]
            with torch.no_grad(), self.resuming(rows):
                resumed = run(inputs[rows])
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, _BoundToBatch):
            return False  # a model whose code around its modules is bound to the batch: it runs whole
        return equal_up_to_rounding(resumed, whole)


def _resumer(queue: deque[tuple[Any, Any]], rows: Tensor | None) -> Callable[[Callable[..., Any]], Any]:
    def around(forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def resumed(*args: Any, **kwargs: Any) -> Any:
            if not queue:
                return forward(*args, **kwargs)
            output, places = queue.popleft()
            if rows is not None:
                return _changed(output, [_picked(*pair, rows) for pair in zip(_leaves(output), places, strict=True)])
            return output if _versions(output) else _copied(output)

        return resumed

    return around


def _remembered(module: nn.Module, output: Any) -> _Call:
    versions = _versions(output)
    return _Call(module, output if versions else _copied(output), versions)


def _versions(output: Any) -> tuple[int, ...]:
    """How often each tensor in an output was written in place; empty under inference mode, which does not count."""
    tensors = [leaf for leaf in _leaves(output) if isinstance(leaf, Tensor)]
    return () if any(tensor.is_inference() for tensor in tensors) else tuple(tensor._version for tensor in tensors)


def _copied(output: Any) -> Any:
    return _changed(output, [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in _leaves(output)])


def _rows_of_leaves(one: Any, other: Any, n_one: int, n_other: int) -> list[_Rows | None]:
    """Where the rows are in each leaf of an output, from two outputs of one module for two numbers of rows."""
    pairs = zip(_leaves(one), _leaves(other), strict=True)
    return [_rows_of(first, second, n_one, n_other) for first, second in pairs]


def _rows_of(one: Any, other: Any, n_one: int, n_other: int) -> _Rows | None:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        if type(one) in PLAIN and type(one) is type(other) and one == other:
            return None
        raise _BoundToBatch
    differing = [axis for axis, sizes in enumerate(zip(one.shape, other.shape, strict=True)) if sizes[0] != sizes[1]]
    if not differing:
        return None
    block, rest = divmod(one.shape[differing[0]], n_one)
    if len(differing) > 1 or rest or other.shape[differing[0]] != block * n_other:
        raise _BoundToBatch
    return _Rows(differing[0], block)


def _picked(leaf: Any, where: _Rows | None, rows: Tensor) -> Any:
    """The given rows of a leaf."""
    if not isinstance(leaf, Tensor):
        return leaf
    if where is None:
        return leaf.clone()  # what the model writes into it must not be seen by the next forward
    places = rows[:, None] * where.block + torch.arange(where.block)
    return leaf.index_select(where.axis, places.reshape(-1).to(leaf.device))


def _leaves(output: Any) -> list[Any]:
    """What is inside an output, however it is nested."""
    if isinstance(output, Mapping):
        output = list(output.values())
    elif isinstance(output, torch.Size):
        return [output]
    return [leaf for one in output for leaf in _leaves(one)] if isinstance(output, (tuple, list)) else [output]


def _changed(output: Any, leaves: list[Any]) -> Any:
    """The same nesting with other leaves, which are used up."""
    if isinstance(output, Mapping):
        values = {key: _changed(value, leaves) for key, value in output.items()}
        return values if type(output) is dict else type(output)(**values)
    if isinstance(output, torch.Size):
        return leaves.pop(0)
    if isinstance(output, (tuple, list)):
        parts = [_changed(value, leaves) for value in output]
        if isinstance(output, list):
            return parts
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    return leaves.pop(0)


def equal_up_to_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs, of one shape, differ at most by the rounding of sums in another order."""
    if one.shape != other.shape:
        return False
    tolerance = min(0.05, ROUNDING * torch.finfo(other.dtype).eps)
    one, other = widened(one), widened(other)
    return bool((one - other).abs().max() <= tolerance * other.abs().max())
