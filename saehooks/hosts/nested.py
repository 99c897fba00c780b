"""A module of the user's own around a TransformerLens model or a CLIP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from saehooks.errors import SiteError
from saehooks.hosts.base import Host
from saehooks.hosts.module import ModuleHost
from saehooks.hosts.sequences import Columns, SequenceWatch
from saehooks.hosts.site import Site, SiteInfo


class NestedHost(ModuleHost):
    """A model whose parts are models of other families: their sites keep their names, and their paths work too.

    Args:
        model: the module around them.
        prefix: what paths begin with that are seen from a wrapper around the model.
        families: the host class of each part, by its path in the model.
    """

    def __init__(self, model: nn.Module, prefix: str, families: Mapping[str, type[Host]]):
        super().__init__(model, prefix)
        self._parts = {path: kind(model.get_submodule(path), f"{prefix}{path}.") for path, kind in families.items()}

    def site(self, name: str, head: int | None = None) -> Site:
        errors: list[SiteError] = []
        found: list[tuple[str, Site]] = []
        for path, part in self._parts.items():
            if self.without_prefix(str(name)).startswith(f"{path}."):
                return self._seen(path, part.site(self.without_prefix(name)[len(path) + 1 :], head), name)
            try:
                found.append((path, part.site(name, head)))
            except SiteError as error:
                errors.append(error)
        if len(found) == 1:
            return self._seen(*found[0], name)
        if found:
            instead = " or ".join(repr(f"{path}.{name}") for path, _ in found)
            raise SiteError(
                f"{len(found)} parts of this {type(self.model).__name__} have a site '{name}': write {instead}"
            )
        with suppress(SiteError):
            return super().site(name, head)
        raise errors[0]

    def list(self) -> list[SiteInfo]:
        own = [info for info in super().list() if not any(info.name.startswith(f"{path}.") for path in self._parts)]
        for path, part in self._parts.items():
            for info in part.list():
                full = f"{path}.{info.name}"
                name, other = (info.name, full) if len(self._parts) == 1 else (full, info.name)
                own.append(info._replace(name=name, aliases=(*info.aliases, other)))
        return own

    def around(self, sites: Iterable[Site]) -> Sequence[nn.Module]:
        sites = list(sites)
        found = [*super().around(sites)]
        for part in self._parts.values():
            found += part.around([site for site in sites if self._part_of(site) is part])
        return list({id(one): one for one in found}.values())

    @contextmanager
    def watching(self, watch: SequenceWatch) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self._parts.values():
                stack.enter_context(part.watching(watch))
            yield

    def padding(self, module: nn.Module, tokens: Tensor) -> Tensor | None:
        found = (p for p in self._parts.values() if any(one is module for one in p.model.modules()))
        part = next(found, None)
        return super().padding(module, tokens) if part is None else part.padding(module, tokens)

    def pooled(self, site: Site, columns: Columns) -> Tensor | None:
        part = self._part_of(site)
        return super().pooled(site, columns) if part is None else part.pooled(site, columns)

    def describe(self) -> dict[str, Any]:
        parts = [*self._parts.values()]
        return parts[0].describe() if len(parts) == 1 else super().describe()

    def entry_points(self) -> Iterator[tuple[nn.Module, str]]:
        yield from super().entry_points()
        for part in self._parts.values():
            yield from part.entry_points()

    def tower(self, site: Site) -> str | None:
        part = self._part_of(site)
        return None if part is None else part.tower(site)

    @property
    def tokenizer(self) -> Any:
        parts = [*self._parts.values()]
        return super().tokenizer or (parts[0].tokenizer if len(parts) == 1 else None)

    def _part_of(self, site: Site) -> Host | None:
        """The part that a site lies in; None for what is the outer module's own."""
        return next(
            (part for part in self._parts.values() if any(one is site.module for one in part.model.modules())), None
        )

    def _seen(self, path: str, site: Site, given: str) -> Site:
        """A site of a part, as it is called here."""
        full = f"{path}.{site.name}"
        name, other = (site.name, full) if len(self._parts) == 1 else (full, site.name)
        return replace(site, name=name, requested_name=given, aliases=(*site.aliases, other))
