"""How results show themselves: rows with a caption, in a terminal, a notebook or a DataFrame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saehooks.errors import ConfigError
from saehooks.show import html, terminal

if TYPE_CHECKING:
    from pandas import DataFrame

SHOWN = 12
"""Rows of a long table in a repr."""


class Table:
    """What results have in common; each says its rows and its caption, and a long one which rows it shows."""

    def rows(self) -> list[dict[str, Any]]:
        """All rows as plain dicts."""
        raise TypeError(f"{type(self).__name__} must override rows()")

    def _caption(self) -> str:
        raise TypeError(f"{type(self).__name__} must override _caption()")

    def _shown(self) -> list[dict[str, Any]]:
        return self.rows()

    def _shown_in_html(self) -> list[dict[str, Any]]:
        return self._shown()

    def to_pandas(self) -> DataFrame:
        """All rows as a DataFrame.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ConfigError("to_pandas needs pandas; write: pip install pandas") from error
        return pandas.DataFrame(self.rows())

    def __repr__(self) -> str:
        return self._caption() + "\n" + terminal.render(terminal.table(self._shown()))

    def _repr_html_(self) -> str:
        return html.table_html(self._shown_in_html(), caption=self._caption())


def named(rows: list[dict[str, Any]], *columns: str) -> list[dict[str, Any]]:
    """Rows for showing, in which numbers that are names are written without thousands separators.

    >>> named([{"latent": 1204, "tokens": 1204}], "latent")
    [{'latent': '1204', 'tokens': 1204}]
    """
    return [{key: str(value) if key in columns else value for key, value in row.items()} for row in rows]
