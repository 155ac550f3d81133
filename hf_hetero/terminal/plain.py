"""This module writes what a command says as plain lines, for files, pipes and logs.

Scripts read them: they do not depend on a terminal, its width or the environment, and have no colours.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from hf_hetero.terminal.blocks import HEAD, Block, Column, Entry, Fact, Line, Table

INDENT = 4
"""Blanks before what is said of an entry."""


def plain(blocks: Iterable[Block]) -> str:
    """Write blocks below each other, without an end of line after the last."""
    return "\n".join(line for block in blocks for line in _lines(block))


def _lines(block: Block) -> Iterator[str]:
    """Write a block."""
    match block:
        case Table():
            yield from _table(block)
        case Fact(label, said, 0):
            yield f"{label:<{HEAD}}{said}"
        case Fact(label, said, width):
            yield from textwrap.wrap(said, width, initial_indent=f"{label:<{HEAD}}", subsequent_indent=" " * HEAD)
        case Entry(name, said, width):
            yield name
            yield from textwrap.wrap(said, width, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT)
        case Line(said):
            yield said


def _table(table: Table) -> Iterator[str]:
    """Write a table: its title, the columns' titles, a line a row, its notes."""
    head = tuple(column.title for column in table.columns)
    rows = [head, *table.rows] if any(head) else table.rows
    widths = [
        column.width or max((len(row[number]) for row in rows), default=0)
        for number, column in enumerate(table.columns)
    ]
    if table.title:
        yield table.title
    yield from (_row(row, table.columns, widths) for row in rows)
    yield from table.notes


def _row(row: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    """Write a row; a cell that is too long moves those after it."""
    cells = (
        " " * column.gap + (cell.ljust(width) if column.is_left else cell.rjust(width))
        for cell, column, width in zip(row, columns, widths, strict=True)
    )
    return "".join(cells).rstrip()
