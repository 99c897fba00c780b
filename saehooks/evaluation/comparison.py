"""What is compared between a clean, a spliced and a zero-ablated run: the interface, and a call of the user's."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from saehooks.errors import ConfigError
from saehooks.hosts import Host
from saehooks.hosts.calls import parameter_names, read_call
from saehooks.hosts.sequences import Columns


class Call(NamedTuple):
    """One call of the model by the user."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        return self.forward(*self.args, **self.kwargs)

    @property
    def given(self) -> dict[str, Any]:
        """The arguments by name; a wrong call fails here with the model's own words."""
        bound = inspect.signature(self.forward).bind(*self.args, **self.kwargs)
        found: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                found |= value
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                found |= {f"*{i}": one for i, one in enumerate(value)}
            else:
                found[name] = value
        return found

    def asking(self, **options: Any) -> Call:
        """The same call with other options, of those that the model knows."""
        signature = inspect.signature(self.forward)
        bound = signature.bind(*self.args, **self.kwargs)
        bound.arguments.update({name: value for name, value in options.items() if name in signature.parameters})
        return Call(self.forward, bound.args, bound.kwargs)

    def instead(self, old: Tensor, new: Tensor) -> Call | None:
        """The same call with another tensor, of the same shape, in place of one that it was given; None if it was
        not."""
        found = False

        def swapped(value: Any) -> Any:
            nonlocal found
            if isinstance(value, Tensor):
                same = value is old or (value.data_ptr() == old.data_ptr() and value.shape == old.shape)
                found |= same
                return new if same else value
            if type(value) is dict:
                return {key: swapped(one) for key, one in value.items()}
            return type(value)(map(swapped, value)) if type(value) in (list, tuple) else value

        changed = Call(self.forward, swapped(self.args), swapped(self.kwargs))
        return changed if found else None

    @property
    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, of any shape, among the arguments."""
        return _tensors((self.args, self.kwargs))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(one)


class Passage(NamedTuple):
    """The text of one call."""

    tokens: Tensor | None
    """(batch, pos) int64; None for pictures, embeddings and texts whose tokens are not known."""
    follows: Tensor | None
    """(batch, pos - 1) bool: whether each column is followed by the next token of the same text."""


def passage_of(host: Host, call: Call, columns: Columns) -> Passage:
    """The text of a call, as the site saw it; else as the call itself says.

    Args:
        columns: of the site, in one run of the call.
    """
    if columns.tokens is not None:
        if not columns.is_known:
            return Passage(columns.tokens, None)
        place = columns.place.expand(columns.shape)
        return Passage(columns.tokens, (place[:, 1:] == place[:, :-1] + 1) & (place[:, :-1] >= 0))
    given = read_call(host.model, parameter_names(call.forward), call.args, call.kwargs)
    if given.tokens is None or given.mask is None or given.mask.shape != given.tokens.shape:
        return Passage(given.tokens, None)
    return Passage(given.tokens, given.mask[:, 1:] & given.mask[:, :-1])


class Comparison(ABC):
    """Compares the outputs of three runs of a call, and keeps sums of the comparison.

    For each call: `check`, `rerun` with the reconstruction, `targets`, `rerun` with zeros and `reduce` at once, then
    the clean run, and `add`.
    """

    nothing_found = "nothing to compare came out of this call"
    """The error message for a call whose output holds nothing to compare."""

    @abstractmethod
    def entry_points(self) -> Iterable[tuple[nn.Module, str]]:
        """The (module, method name) pairs whose calls are measured."""

    @abstractmethod
    def check(self, call: Call) -> None:
        """Refuse a call that cannot be measured, before anything runs."""

    @abstractmethod
    def rerun(self, call: Call) -> Any:
        """Run the call again for the output that is compared."""

    @abstractmethod
    def compared(self, output: Any) -> Tensor | None:
        """The tensor (batch, ...) to compare, from what a run returned; None if there is none."""

    @abstractmethod
    def targets(self, call: Call, passage: Passage, output: Any) -> Any:
        """What the call's outputs are compared with, from its arguments and one output tensor."""

    @abstractmethod
    def reduce(self, output: Tensor, targets: Any) -> Tensor:
        """The part of the zero-ablated output, (batch, ...), that the comparison needs."""

    @abstractmethod
    def add(self, targets: Any, clean: Tensor, spliced: Tensor, zero: Tensor) -> None:
        """Compare outputs (batch, ...) of the three runs and add to the sums; ``zero`` is what `reduce` returned."""

    @abstractmethod
    def summary(self) -> dict[str, float]:
        """The figures so far."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """Table rows with the columns clean, spliced, zero-ablated."""

    @abstractmethod
    def figures(self) -> dict[str, Any]:
        """The other figures, by the name a reader sees."""

    @abstractmethod
    def how_to_call(self) -> str:
        """What to write so that something is measured."""

    @property
    def nothing_compared(self) -> str | None:
        """Why the calls that were measured gave nothing to compare; None if they did."""
        return None

    def set_labels(self, labels: Any) -> None:
        """Take the labels of the next call's images."""
        raise ConfigError("labels belong to images that prompts= classify; give other labels to the model's own call")
