"""What every model family offers: a host that finds its sites and runs its forward passes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from saehooks.hosts.early_stop import stopping
from saehooks.hosts.sequences import Columns, SequenceWatch, ancestors
from saehooks.hosts.site import Site, SiteInfo


class Host(ABC):
    """One model, seen as a set of sites and a stream of forward passes."""

    family: str
    """``"transformer_lens"``, ``"open_clip"`` or ``"module"``."""

    def __init__(self, model: nn.Module, prefix: str = ""):
        self.model = model
        self.prefix = prefix
        """What paths begin with that are seen from a wrapper around the model."""

    def without_prefix(self, name: str) -> str:
        """The name of a site as it is inside the wrappers of the model."""
        return name[len(self.prefix) :] if self.prefix and name.startswith(self.prefix) else name

    @abstractmethod
    def site(self, name: str, head: int | None = None) -> Site:
        """Find the site called ``name``.

        Args:
            name: any name or alias that ``list()`` shows.
            head: at a site with one vector per attention head, the head to show alone.
        Raises:
            SiteError: no such site, or one that can never fire as the model is set up; says what to write instead.
        """

    @abstractmethod
    def list(self) -> list[SiteInfo]:
        """Every site an SAE can be attached to, in the order of the model."""

    def around(self, sites: Iterable[Site]) -> Sequence[nn.Module]:
        """The modules whose calls tell which text passes some sites: all that hold one of them, outermost first."""
        found = [one for site in sites for one in ancestors([self.model], site.module)]
        return list({id(one): one for one in found}.values())

    def watching(self, watch: SequenceWatch) -> AbstractContextManager[None]:
        """Tell a watch, inside the block, of calls that no module's hook sees."""
        return nullcontext()

    def padding(self, module: nn.Module, tokens: Tensor) -> Tensor | None:
        """(batch, pos) bool, False at padding that the model itself knows, of a call of ``module`` without a mask."""
        return None

    def pooled(self, site: Site, columns: Columns) -> Tensor | None:
        """(pos,) or (batch, pos) bool: what the output of a CLIP's tower is read from; None elsewhere."""
        return None

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What an SAE should remember of the model it was trained on: family, model_name, processing."""

    @abstractmethod
    def entry_points(self) -> Iterator[tuple[nn.Module, str]]:
        """The (module, method name) pairs by which users start a forward pass."""

    @abstractmethod
    def run(self, batch: Any) -> Any:
        """Run one forward pass on a batch, with the cheapest output. The gradient mode is the caller's."""

    @property
    def device(self) -> torch.device:
        """Where the model's parameters live."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def to_device(self, batch: Any) -> Any:
        """A batch with its tensors, also those in dicts, lists and tuples, on the model's device."""
        if isinstance(batch, Tensor):
            return batch.to(self.device, non_blocking=True)
        if isinstance(batch, Mapping):
            return {name: self.to_device(value) for name, value in batch.items()}
        if type(batch) in (list, tuple):
            return type(batch)(self.to_device(value) for value in batch)
        return batch

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that came with the model, or None."""
        return getattr(self.model, "tokenizer", None)

    def tower(self, site: Site) -> str | None:
        """Which tower of a CLIP a site is in: ``"visual"``, ``"text"``, or None elsewhere."""
        return None

    def stop_at(self, site: Site) -> AbstractContextManager[None]:
        """End every forward pass inside the block right after ``site`` has fired.

        All hooks at the site run, later layers do not, and the call of the model returns None. A pass that does
        not reach the site runs to its end.
        """
        return stopping(site.module, site.slot, tuple(self.entry_points()))


def is_tokens(value: Any) -> bool:
    """Whether a value looks like token ids: an integer tensor of shape (batch, pos)."""
    return (
        isinstance(value, Tensor)
        and value.dim() == 2
        and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    )
