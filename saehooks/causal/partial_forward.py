"""Running only what comes after a site: what ran before it is remembered once, and handed out again.

It works for any model: whichever module calls had ended when the site fired, outermost ones first, return what they
returned, for the wanted rows of the batch; the model's own code around them runs as ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from saehooks.hosts import Host, Site
from saehooks.hosts.early_stop import replaced_method

TOLERANCE = 1e-3
"""Largest difference, over the largest output, between a resumed forward and a whole one: rounding only."""


class Prefix:
    """What ran before a site in one forward."""

    def __init__(self) -> None:
        self.batch = 0
        """Rows of the batch that was remembered."""
        self._calls: list[tuple[nn.Module, Any]] = []
        self._reached = False

    @contextmanager
    def recording(self, host: Host, site: Site, batch: int) -> Iterator[None]:
        """Remember, inside the block, one forward of ``batch`` rows up to the site."""
        self.batch = batch
        with ExitStack() as stack:
            for module in host.model.modules():
                if module is not host.model:
                    stack.enter_context(replaced_method(module, "forward", self._recorder(module)))
            stack.callback(site.hook(self._at_site).remove)
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
                    self._calls.append((module, output))
                return output

            return recorded

        return around

    @contextmanager
    def resuming(self, rows: Tensor) -> Iterator[None]:
        """Inside the block, one forward of these rows of the remembered batch starts at the site.

        Args:
            rows: (n,) int64; a row may come many times.
        """
        outputs: dict[nn.Module, deque[Any]] = {}
        for module, output in self._calls:
            outputs.setdefault(module, deque()).append(output)
        with ExitStack() as stack:
            for module, queue in outputs.items():
                stack.enter_context(replaced_method(module, "forward", self._resumer(queue, rows)))
            yield

    def _resumer(self, queue: deque[Any], rows: Tensor) -> Callable[[Callable[..., Any]], Any]:
        def around(forward: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(forward)
            def resumed(*args: Any, **kwargs: Any) -> Any:
                return _pick(queue.popleft(), rows, self.batch) if queue else forward(*args, **kwargs)

            return resumed

        return around

    def is_exact(self, run: Callable[[Tensor], Tensor], inputs: Tensor, clean: Tensor) -> bool:
        """Whether resuming gives what a whole forward gives: tried on a few rows, in another order and number."""
        rows = torch.tensor([self.batch - 1, 0] if self.batch != 2 else [1, 0, 1])
        try:
            with torch.no_grad(), self.resuming(rows):
                resumed = run(inputs[rows])
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):
            return False  # a model whose code around its modules is bound to the batch: it runs whole
        whole = clean[rows.to(clean.device)]
        if resumed.shape != whole.shape:
            return False
        return bool((resumed - whole).abs().max() <= TOLERANCE * whole.abs().max())


def _pick(output: Any, rows: Tensor, batch: int) -> Any:
    """Rows of every tensor inside an output that has the batch as its first axis."""
    if isinstance(output, Tensor):
        per_row = output.dim() > 0 and output.shape[0] == batch
        return output.index_select(0, rows.to(output.device)) if per_row else output
    if isinstance(output, Mapping):
        picked = {key: _pick(value, rows, batch) for key, value in output.items()}
        return picked if type(output) is dict else type(output)(**picked)
    if isinstance(output, (tuple, list)):
        values = [_pick(value, rows, batch) for value in output]
        if isinstance(output, list):
            return values
        return type(output)(*values) if hasattr(output, "_fields") else tuple(values)
    return output
