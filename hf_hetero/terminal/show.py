"""This module says what a command has found: drawn where a person looks at a terminal, in plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import TextIO

from hf_hetero.terminal.blocks import Block
from hf_hetero.terminal.literal import literal
from hf_hetero.terminal.plain import plain


def show(*blocks: Block) -> None:
    """Print blocks on the standard output.

    Plain lines are the same wherever they go; only a terminal that cannot draw has them made literal. rich is imported
    where it draws, and nowhere else.
    """
    if is_drawn():
        from hf_hetero.terminal.drawn import draw

        draw(blocks, sys.stdout)
    else:
        print("\n".join(_shown(line, sys.stdout) for line in plain(blocks).split("\n")))


def show_error(said: str) -> None:
    """Print a line on the standard error that may quote what a user, a file or a library wrote."""
    print(_shown(said, sys.stderr), file=sys.stderr)


def is_drawn() -> bool:
    """Tell whether the standard output is a terminal that can show drawn tables, and rich is there to draw them."""
    is_dumb = os.environ.get("TERM", "").lower() in {"dumb", "unknown"}
    return sys.stdout.isatty() and not is_dumb and find_spec("rich") is not None


def _shown(line: str, file: TextIO) -> str:
    """Make a line literal where a terminal would read it; files and pipes get every letter."""
    return literal(line, file.encoding) if file.isatty() else line
