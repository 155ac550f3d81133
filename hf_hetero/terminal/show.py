"""This module says what a command has found: drawn where a person looks at a terminal, in plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

from hf_hetero.terminal.blocks import Block
from hf_hetero.terminal.plain import plain


def show(*blocks: Block) -> None:
    """Print blocks on the standard output.

    Plain lines are the same wherever they go. rich is imported where it draws, and nowhere else.
    """
    if is_drawn():
        from hf_hetero.terminal.drawn import draw

        draw(blocks, sys.stdout)
    else:
        print(plain(blocks))


def is_drawn() -> bool:
    """Tell whether the standard output is a terminal that can show drawn tables, and rich is there to draw them."""
    is_dumb = os.environ.get("TERM", "").lower() in {"dumb", "unknown"}
    return sys.stdout.isatty() and not is_dumb and find_spec("rich") is not None
