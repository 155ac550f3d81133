"""This module draws what a command says in a terminal, as wide as that is. It is the only door to rich.

Words that came from data, files or models are never read as markup, nor by the terminal (`literal`).
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from hf_hetero.terminal.blocks import HEAD, Block, Entry, Fact, Line, Table, Tone
from hf_hetero.terminal.fitting import Cells, Part, fitted
from hf_hetero.terminal.literal import literal
from hf_hetero.terminal.plain import INDENT

MOST_PROSE = 110
"""Letters of a line of sentences: longer ones are hard to read, however wide the terminal."""
LEAST_PROSE = 20
UNBOUNDED = 1_000_000
"""Letters of rich's lines: all is fitted before, and rich would cut what is too wide for a terminal of some letters."""
COLOURS: dict[Tone, str] = {"": "", "good": "green", "bad": "red"}


def draw(blocks: Iterable[Block], file: TextIO, width: int | None = None) -> None:
    """Draw blocks below each other.

    Args:
        blocks: what to draw.
        file: a terminal. Colours are those that it has by its `TERM`; none where `NO_COLOR` is set.
        width: of the terminal, in letters; None: what it says.
    """
    console = Console(
        file=file,
        width=UNBOUNDED,
        force_terminal=True,
        force_jupyter=False,
        # rich asks the variables that were there when it was imported, which need not be those of now
        no_color=os.environ.get("NO_COLOR", "") != "",
        legacy_windows=False,
        markup=False,
        emoji=False,
        highlight=False,
    )
    _Pen(console, width or shutil.get_terminal_size().columns, lambda text: literal(text, console.encoding)).draw(
        blocks
    )


class _Pen:
    """A pen draws on one console, in words made literal."""

    def __init__(self, console: Console, width: int, shown: Callable[[str], str]) -> None:
        self._console, self._width, self._shown = console, width, shown

    def draw(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            match block:
                case Table():
                    self._table(block)
                case Fact(label, said, _, tone):
                    head = Text(f"{self._shown(label):<{HEAD}}", f"bold {COLOURS[tone]}".strip())
                    self._prose(said, head, COLOURS[tone])
                case Entry(name, said):
                    self._write(Text(self._shown(name), "bold"))
                    self._prose(said, Text(" " * INDENT))
                case Line(said):
                    self._write(Text(self._shown(said)))

    def _write(self, text: Text) -> None:
        """Write a line; the terminal wraps it, so that it can be copied whole."""
        self._console.print(text, soft_wrap=True)

    def _prose(self, said: str, head: Text | None = None, style: str = "") -> None:
        """Write sentences, wrapped between words; those after the first line are indented as it is."""
        head = head or Text()
        indent = cell_len(head.plain)
        room = max(min(self._width, MOST_PROSE) - indent, LEAST_PROSE)
        for number, line in enumerate(Text(self._shown(said), style).wrap(self._console, room)):
            line.rstrip()
            self._write(Text().append_text(head if number == 0 else Text(" " * indent)).append_text(line))

    def _table(self, table: Table) -> None:
        """Write a table, in parts if it must be, with its title above and its notes below."""
        if table.title:
            self._prose(table.title, style="bold")
        columns = [
            Cells(
                tuple(title for title in (self._shown(column.title), self._shown(column.unit)) if title),
                tuple(self._shown(row[number]) for row in table.rows),
                column.is_text,
            )
            for number, column in enumerate(table.columns)
        ]
        for place, part in enumerate(fitted(columns, table.key, self._width, cell_len)):
            if place:
                self._write(Text())
            self._console.print(self._part(table, columns, part, place == 0))
        for note in table.notes:
            self._prose(note)

    def _part(self, table: Table, columns: Sequence[Cells], part: Part, is_first: bool) -> RichTable:
        """Make the columns of a table that are drawn together."""
        drawn = RichTable(
            box=box.ROUNDED if part.is_framed else box.SIMPLE_HEAD,
            show_edge=part.is_framed,
            pad_edge=part.is_framed,
            padding=(0, 1) if part.is_framed else (0, 1, 0, 0),
            show_header=any(columns[number].titles for number in part.columns),
            header_style="",
        )
        for number, width in zip(part.columns, part.widths, strict=True):
            is_text = table.columns[number].is_text
            drawn.add_column(
                self._head(table.columns[number].title, table.columns[number].unit, width),
                width=width,
                justify="left" if is_text else "right",
                style="cyan" if number == table.key else "",
                no_wrap=not is_text,
                overflow="fold",
            )
        for row in zip(*(columns[number].cells for number in part.columns), strict=True):
            if is_first or any(row[1:]):  # of a row, columns further to the right may all be empty
                drawn.add_row(*map(Text, row))
        return drawn

    def _head(self, title: str, unit: str, width: int) -> Text:
        """Write a column's title, and below it, paler, its unit."""
        lines = textwrap.wrap(self._shown(title), width, break_long_words=False) if title else []
        head = Text("\n".join(lines), "bold")
        if unit:
            head.append("\n" if lines else "").append(
                "\n".join(textwrap.wrap(self._shown(unit), width)), "not bold dim"
            )
        return head
