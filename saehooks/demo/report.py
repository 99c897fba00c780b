"""The demo's output, written twice: to the terminal as it happens, and to the HTML page at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.text import Text

from saehooks.show import figures, html, terminal
from saehooks.storage import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Report:
    """Sections of text, code, tables, shaded tokens and pictures.

    Args:
        console: where to print; pictures are on the page alone.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.sections: list[html.Section] = []
        self._started = time.perf_counter()

    def begin(self, title: str, words: str, code: str = "") -> None:
        """Start a section: its title, what it shows, and the user's lines that do it."""
        self.sections.append(html.Section(title))
        self.console.print()
        self.console.rule(f"[bold]{len(self.sections)}. {title}", align="left")
        self.say(words)
        if code:
            self._add(html.code(code))
            self.console.print(Text(code.strip("\n"), style="cyan"))

    def say(self, words: str) -> None:
        """A paragraph."""
        self._add(html.paragraph(words))
        self.console.print(Text(words.replace("`", "")))

    def table(
        self, rows: Sequence[Mapping[str, Any]], caption: str = "", on_page: Mapping[str, Sequence[Any]] | None = None
    ) -> None:
        """A table of rows; ``on_page`` are further columns, of HTML, that a terminal cannot show."""
        more = (on_page or {}).items()
        full = [{**row, **{name: column[i] for name, column in more}} for i, row in enumerate(rows)]
        self._add(html.table_html(full, caption=caption))
        self.console.print(terminal.table(rows, title=caption or None))

    def tokens(self, tokens: Sequence[str], values: Any, *, top: Any = None, unit: str, caption: str) -> None:
        """Tokens shaded by a value each."""
        self._add(html.tokens_html(tokens, values, top=top, unit=unit, caption=caption))
        self.console.print(Text(caption, style="dim"))
        self.console.print(terminal.tokens_text(tokens, values))

    def show(self, shown: Any) -> None:
        """Anything that has a rich and a notebook form, such as what `measure` gives."""
        self._add(f'<div class="scroll">{shown._repr_html_()}</div>')
        self.console.print(shown)

    def figure(self, figure: Figure, alt: str, *, photo: bool = False) -> None:
        """A picture, on the page alone."""
        self._add(html.image(figures.png(figure), alt, photo=photo))

    def quotes(self, texts: Mapping[str, str]) -> None:
        """Generated texts by the name of what made them."""
        self._add(html.table_html([{"": name, "text": text} for name, text in texts.items()]))
        for name, text in texts.items():
            line: RenderableType = Text.assemble((f"{name}: ", "bold"), text.replace("\n", " ↵ "))
            self.console.print(line)

    def write(self, file: str | Path, title: str, lead: str) -> Path:
        """Write the page, whole or not at all."""
        seconds = time.perf_counter() - self._started
        footer = f"Written by `saehooks demo` in {seconds:.0f} seconds."
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, html.page(title, self.sections, lead=lead, footer=footer).encode("utf-8"))
        self.console.print()
        self.console.print(f"[bold]Wrote {path}[/] ({path.stat().st_size / 1e6:.1f} MB) in {seconds:.0f} seconds.")
        return path

    def _add(self, part: str) -> None:
        self.sections[-1].add(part)
