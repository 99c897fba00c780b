"""The list of sites, as a table."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any, overload

from saehooks.hosts.base import SiteInfo

COLUMNS = ("site", "width", "axes", "also called", "note")


class SiteTable(Sequence[SiteInfo]):
    """Every place where an SAE can be attached to one model.

    >>> table = SiteTable([SiteInfo("blocks.0.hook_resid_pre", ("blocks.0.hook_in",), 8, "batch pos width")])
    >>> table.names, table[0].width, len(table.find("resid_post"))
    (['blocks.0.hook_resid_pre'], 8, 0)
    """

    def __init__(self, infos: Sequence[SiteInfo]):
        self._infos = list(infos)

    @overload
    def __getitem__(self, index: int) -> SiteInfo: ...
    @overload
    def __getitem__(self, index: slice) -> SiteTable: ...
    def __getitem__(self, index: int | slice) -> SiteInfo | SiteTable:
        return SiteTable(self._infos[index]) if isinstance(index, slice) else self._infos[index]

    def __len__(self) -> int:
        return len(self._infos)

    def __iter__(self) -> Iterator[SiteInfo]:
        return iter(self._infos)

    @property
    def names(self) -> list[str]:
        """The name of each site, in the order of the model."""
        return [info.name for info in self._infos]

    def find(self, text: str) -> SiteTable:
        """The sites whose name, or one of whose aliases, contains ``text``."""
        return SiteTable([info for info in self._infos if any(text in one for one in (info.name, *info.aliases))])

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (info.name, "?" if info.width is None else str(info.width), info.shape, ", ".join(info.aliases), info.note)
            for info in self._infos
        ]

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(*COLUMNS, box=None)
        for row in self._rows():
            table.add_row(*row)
        return table

    def __repr__(self) -> str:
        if not self._infos:
            return "no sites"
        rows = [COLUMNS, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self._rows()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
