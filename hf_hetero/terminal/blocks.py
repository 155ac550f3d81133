"""These are the parts of what a command says, whichever way it is written: tables, facts, entries, lines.

A part holds words and numbers that are written already, and what both ways to write it need to know. `plain` makes
lines of it, `drawn` what a terminal shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tone = Literal["", "good", "bad"]
"""Whether news are good or bad, which a terminal shows in colour; words say it, too."""

HEAD = 10
"""Letters that the label of a fact takes."""


@dataclass(frozen=True, slots=True)
class Column:
    """A `Column` describes the cells that stand below each other.

    Args:
        title: above the cells; in plain lines a table whose columns all have none begins with its first row.
        unit: what the cells count, where the title does not say it; a terminal has it below the title.
        width: letters that a plain cell takes at least; 0: as many as the longest.
        gap: blanks before a plain cell.
        is_text: words, which a narrow terminal wraps; numbers are never cut nor wrapped.
        is_left: plain cells begin below each other, and do not end so. A terminal has all words so, and no number.
    """

    title: str = ""
    unit: str = ""
    width: int = 0
    gap: int = 0
    is_text: bool = False
    is_left: bool = False


def number(title: str = "", width: int = 0, unit: str = "", gap: int = 0) -> Column:
    """Describe a column of numbers, which end below each other."""
    return Column(title, unit, width, gap)


def words(title: str = "", width: int = 0, unit: str = "", gap: int = 0, is_left: bool = True) -> Column:
    """Describe a column of words."""
    return Column(title, unit, width, gap, is_text=True, is_left=is_left)


@dataclass(frozen=True, slots=True)
class Table:
    """A `Table` is rows of cells.

    Args:
        columns: from left to right.
        rows: of as many cells each.
        title: a line above it.
        notes: sentences below it, a paragraph each.
        key: the column that says what a row is about. Where a terminal is too narrow for all columns, each of the
            tables that it is cut into begins with this one.

    Raises:
        ValueError: a row has more or fewer cells than there are columns, or no column is the key.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    notes: tuple[str, ...] = ()
    key: int = 0

    def __post_init__(self) -> None:
        """Compare rows with columns."""
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"The row {row} has {len(row)} cells; the table has {len(self.columns)} columns.")
        if not 0 <= self.key < len(self.columns):
            raise ValueError(f"The key is column {self.key}; the table has {len(self.columns)} columns.")


@dataclass(frozen=True, slots=True)
class Fact:
    """A `Fact` is something said about what its label names.

    Args:
        label: at most nine letters.
        said: about it.
        width: letters of a plain line, which is wrapped there; 0: it is not wrapped.
        tone: of what is said.
    """

    label: str
    said: str
    width: int = 0
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """An `Entry` of a list is a name, and indented below it what is said about it.

    Args:
        name: on a line of its own.
        said: about it.
        width: letters of a plain line, which is wrapped there.
    """

    name: str
    said: str
    width: int


@dataclass(frozen=True, slots=True)
class Line:
    """A `Line` is a sentence by itself; empty, it parts what stands above from what stands below."""

    said: str = ""


Block = Table | Fact | Entry | Line
