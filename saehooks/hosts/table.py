"""The list of sites, as a table of one page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

from saehooks.hosts.names import unknown_site
from saehooks.hosts.site import SiteInfo

COLUMNS = ("site", "width", "axes", "also called", "note")

ROWS_SHOWN = 40
"""Rows on a page; sites that differ only in their numbers share one."""

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


class SiteTable(Sequence[SiteInfo]):
    """Every place where an SAE can be attached to one model.

    It is shown with one row for the same place in all blocks; as a sequence it holds each of them.

    >>> names = [(f"blocks.{i}.hook_resid_pre", f"blocks.{i}.hook_in") for i in (0, 1, 2)]
    >>> table = SiteTable([SiteInfo(name, (alias,), 8, "batch pos width") for name, alias in names])
    >>> table.names[-1], table[0].width, len(table.find("resid_post"))
    ('blocks.2.hook_resid_pre', 8, 0)
    >>> table
    site                         width  axes             also called           note
    blocks.{0-2}.hook_resid_pre  8      batch pos width  blocks.{0-2}.hook_in
    """

    def __init__(self, infos: Sequence[SiteInfo]):
        self._infos = list(infos)

    @overload
    def __getitem__(self, index: int) -> SiteInfo: ...
    @overload
    def __getitem__(self, index: str) -> SiteInfo: ...
    @overload
    def __getitem__(self, index: slice) -> SiteTable: ...
    def __getitem__(self, index: int | str | slice) -> SiteInfo | SiteTable:
        """A site by its place or by any of its names, or several by a slice.

        Raises:
            SiteError: no site has this name.
        """
        if isinstance(index, str):
            found = next((info for info in self._infos if index in (info.name, *info.aliases)), None)
            if found is None:
                raise unknown_site(index, self.names)
            return found
        return SiteTable(self._infos[index]) if isinstance(index, slice) else self._infos[index]

    def __contains__(self, site: object) -> bool:
        """Whether there is such a site, by any of its names."""
        return any(site in (info.name, *info.aliases) or site is info for info in self._infos)

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
        return [row.cells() for row in _merged(self._infos)]

    def _left_out(self, n_rows: int) -> str:
        """What to say of the rows after the first page; empty if there are none."""
        more = n_rows - ROWS_SHOWN
        return "" if more <= 0 else f"... and {more} rows more: .find(text) finds sites, .names lists all {len(self)}"

    def __rich__(self) -> Any:
        from rich.table import Table

        rows = self._rows()
        table = Table(*COLUMNS, box=None, caption=self._left_out(len(rows)) or None)
        for row in rows[:ROWS_SHOWN]:
            table.add_row(*row)
        return table

    def __repr__(self) -> str:
        if not self._infos:
            return "no sites"
        all_rows = self._rows()
        rows = [COLUMNS, *all_rows[:ROWS_SHOWN]]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(filter(None, [*lines, self._left_out(len(all_rows))]))

    def _repr_html_(self) -> str:
        rows = self._rows()
        head = "".join(f"<th>{name}</th>" for name in COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[:ROWS_SHOWN]
        )
        left_out = html.escape(self._left_out(len(rows)))
        caption = f"<caption style='caption-side:bottom'>{left_out}</caption>" if left_out else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class _Row(NamedTuple):
    """Sites that differ only in numbers: every combination of them exists."""

    pattern: str
    """The name, ``#`` in the place of each number."""
    numbers: tuple[tuple[int, ...], ...]
    """The numbers that stand at each of these places."""
    width: int | None
    shape: str
    aliases: tuple[str, ...]
    note: str

    @classmethod
    def of(cls, info: SiteInfo) -> _Row:
        numbers = NUMBER.findall(info.name)
        aliases = [NUMBER.sub("#", one) if NUMBER.findall(one) == numbers else one for one in info.aliases]
        alone = tuple((int(number),) for number in numbers)
        return cls(NUMBER.sub("#", info.name), alone, info.width, info.shape, tuple(aliases), info.note)

    def cells(self) -> tuple[str, ...]:
        width = "?" if self.width is None else str(self.width)
        return self._filled(self.pattern), width, self.shape, ", ".join(map(self._filled, self.aliases)), self.note

    def _filled(self, pattern: str) -> str:
        for numbers in self.numbers:
            pattern = pattern.replace("#", _spelled(numbers), 1)
        return pattern


def _merged(infos: Sequence[SiteInfo]) -> list[_Row]:
    """One row for sites that differ only in numbers, at the place of the first of them."""
    rows = [_Row.of(info) for info in infos]
    for place in range(max((len(row.numbers) for row in rows), default=0)):
        groups: dict[Any, list[_Row]] = {}
        for row in rows:
            others = row.numbers[:place] + row.numbers[place + 1 :]
            groups.setdefault((row._replace(numbers=others), len(row.numbers) > place), []).append(row)
        rows = [
            group[0] if len(group) == 1 else group[0]._replace(numbers=_union([one.numbers for one in group], place))
            for group in groups.values()
        ]
    return rows


def _union(numbers: Sequence[tuple[tuple[int, ...], ...]], place: int) -> tuple[tuple[int, ...], ...]:
    first = list(numbers[0])
    first[place] = tuple(sorted({number for one in numbers for number in one[place]}))
    return tuple(first)


def _spelled(numbers: Sequence[int]) -> str:
    """
    >>> _spelled([3]), _spelled([0, 1, 2, 5])
    ('3', '{0-2,5}')
    """
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) + "}"
