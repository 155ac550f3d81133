"""Progress that a person can read: bars in a terminal, lines elsewhere, and never one across the other."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

DELAY_S = 1.0
"""What takes less is not worth a bar."""
EVERY_S = 30.0
"""Between two lines, where there is no terminal: a log is read later."""
LEAST_WIDTH = 20
"""Letters of a line in a terminal, however narrow that is."""


def shows_bars() -> bool:
    """Tell whether bars can be redrawn in place: in a notebook, or where both outputs are a terminal.

    Where one of them is a file or a pipe, lines come to the terminal at other times than they are written, and a bar
    would be torn by them.
    """
    is_widget = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
    return is_widget or (sys.stdout.isatty() and sys.stderr.isatty())


def say(line: str) -> None:
    """Print a line, or several, above the bars that are shown; at once, also into a file.

    In a terminal, a line that is too long for it goes on in the next, indented, with the next word.
    """
    if sys.stdout.isatty():
        width = max(shutil.get_terminal_size().columns, LEAST_WIDTH)
        line = "\n".join(part for one in line.split("\n") for part in _wrapped(one, width))
    tqdm.write(line)
    sys.stdout.flush()


def _wrapped(line: str, width: int) -> list[str]:
    """Part a line between words; blanks that make columns of it stay."""
    if len(line) <= width:
        return [line]
    return textwrap.wrap(line, width, subsequent_indent="   ", break_long_words=False, break_on_hyphens=False)


@contextmanager
def progress(total: int, doing: str, unit: str, is_shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show how far some work is, if it takes long: as a bar that vanishes, or a line on stderr every half minute.

    Args:
        total: how much there is to do.
        doing: in words, such as "Counting tokens".
        unit: of what is counted, in the plural.
        is_shown: on the rank that speaks.

    Yields:
        A function that is told how much more was done.
    """
    if is_shown and shows_bars():
        with tqdm(total=total, desc=doing, unit=f" {unit}", leave=False, delay=DELAY_S, dynamic_ncols=True) as bar:
            yield lambda done: (bar.update(done), None)[1]
        return
    num_done, next_s = 0, time.monotonic() + EVERY_S

    def count(done: int) -> None:
        nonlocal num_done, next_s
        num_done += done
        if is_shown and time.monotonic() >= next_s:
            print(f"{doing}: {num_done:,} of {total:,} {unit}", file=sys.stderr, flush=True)
            next_s = time.monotonic() + EVERY_S

    yield count


def each(items: Sequence[T], doing: str, unit: str) -> Iterator[T]:
    """Give one item after the other, and show how far that is (`progress`)."""
    with progress(len(items), doing, unit) as count:
        for item in items:
            yield item
            count(1)
