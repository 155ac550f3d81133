"""This module fits a table into a terminal: how wide its columns are, and where it is cut if they do not fit.

Numbers are never cut or wrapped. What gives way, in this order: titles are wrapped, then the frame goes, then words
are wrapped, then columns go into a table of their own, below, which begins with the key. Where a terminal is too narrow
even for the key and one more, they are wider than it is: it wraps the lines, and nothing is lost.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LEAST_WORDS = 12
"""Letters of a line of words; fewer only if no cell has more."""
MOST_WORD = 24
"""Letters of a word that is still kept whole."""


@dataclass(frozen=True, slots=True)
class Cells:
    """`Cells` are a column to be fitted.

    Args:
        titles: lines of its head.
        cells: below it.
        is_text: words, which may be wrapped.
    """

    titles: tuple[str, ...]
    cells: tuple[str, ...]
    is_text: bool


@dataclass(frozen=True, slots=True)
class Part:
    """A `Part` of a table is drawn by itself.

    Args:
        columns: by their number in the table, from left to right; the first is the key.
        widths: of each, without what is between them.
        is_framed: lines are drawn around it and between its columns.
    """

    columns: tuple[int, ...]
    widths: tuple[int, ...]
    is_framed: bool

    @property
    def width(self) -> int:
        """Return the letters of a line, with what is between and around the columns."""
        return sum(self.widths) + _between(len(self.widths), self.is_framed)


def fitted(columns: Sequence[Cells], key: int, width: int, measure: Callable[[str], int] = len) -> list[Part]:
    """Fit a table into so many letters.

    Args:
        columns: of the table.
        key: the column that says what a row is about.
        width: of the terminal.
        measure: how many letters some text takes.
    """
    order = [key, *(number for number in range(len(columns)) if number != key)]
    natural = [max(map(measure, (*column.titles, *column.cells)), default=0) for column in columns]
    lean = [_lean(column, measure) for column in columns]
    half = [most if column.is_text else least for column, most, least in zip(columns, natural, lean, strict=True)]
    for least, is_framed in ((natural, True), (half, True), (half, False), (lean, True), (lean, False)):
        room = width - _between(len(order), is_framed)
        if sum(least) <= room:
            most = [top if column.is_text else low for column, top, low in zip(columns, natural, least, strict=True)]
            widths = _shared(least, most, room)
            return [Part(tuple(order), tuple(widths[number] for number in order), is_framed)]
    return _cut(order, lean, natural, columns, width)


def _cut(
    order: Sequence[int], lean: Sequence[int], natural: Sequence[int], columns: Sequence[Cells], width: int
) -> list[Part]:
    """Deal the columns to tables that begin with the key, as many to each as fit."""
    key, others = order[0], list(order[1:])
    parts: list[Part] = []
    while others:
        taken = [key, others.pop(0)]
        while others and sum(lean[n] for n in (*taken, others[0])) + _between(len(taken) + 1, False) <= width:
            taken.append(others.pop(0))
        room = width - _between(len(taken), False)
        most = [natural[n] if columns[n].is_text else lean[n] for n in taken]
        parts.append(Part(tuple(taken), tuple(_shared([lean[n] for n in taken], most, room)), False))
    return parts or [Part((key,), (lean[key],), False)]


def _between(num_columns: int, is_framed: bool) -> int:
    """Count the letters between and around columns: a line with a blank at each side, or two blanks."""
    return 3 * num_columns + 1 if is_framed else 2 * (num_columns - 1)


def _lean(column: Cells, measure: Callable[[str], int]) -> int:
    """Return the fewest letters that a column takes: its numbers, its titles' words; of its words a fair part."""
    titles = max((measure(word) for title in column.titles for word in pieces(title)), default=0)
    if not column.is_text:
        return max(titles, *map(measure, column.cells), 0)
    longest = max(map(measure, column.cells), default=0)
    word = max((measure(word) for cell in column.cells for word in cell.split()), default=0)
    return max(titles, min(longest, max(LEAST_WORDS, min(word, MOST_WORD))))


def pieces(title: str) -> list[str]:
    """Part a title where a line of it may end: at blanks, and after hyphens."""
    return textwrap.wrap(title, 1, break_long_words=False)


def _shared(least: Sequence[int], most: Sequence[int], room: int) -> list[int]:
    """Share room among columns, evenly, until each has what it would take at most."""
    widths = list(least)
    left = room - sum(widths)
    wanting = [number for number, width in enumerate(widths) if width < most[number]]
    while left > 0 and wanting:
        share = max(1, left // len(wanting))
        for number in sorted(wanting, key=lambda number: most[number] - widths[number]):
            more = min(share, most[number] - widths[number], left)
            widths[number] += more
            left -= more
        wanting = [number for number in wanting if widths[number] < most[number]]
    return widths
