"""This module holds what all pictures share: colours, figures, files. It needs matplotlib (`hf-hetero[report]`).

That is imported when the first picture is drawn, so that tables and the command line do without it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_hetero.errors import HeteroError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LENGTH_COLOURS = ("#dbe9f1", "#97c3d8", "#3f82aa", "#3d4a86", "#a63a50")  # short to long
DEGREE_COLOURS = ("#a9cbdb", "#4a90b5", "#1f5683", "#0b2545", "#e3a66b", "#c8693a", "#7d3528")  # degree 1, 2, 4, ...
IDLE, FIXED, INK, ACCENT = "#ececea", "#c4c2bc", "#2b2f33", "#d9772b"
# with a fixed salt, the same picture gives the same file
STYLE: dict[Any, Any] = {"font.size": 9, "axes.edgecolor": "#9a9a98", "legend.frameon": False, "svg.hashsalt": "1"}


def short(tokens: int) -> str:
    """Write 1536 as 1.5K: in thousands of 1024."""
    return f"{tokens / 1024:.3g}K" if tokens >= 1024 else str(tokens)


def new_figure(width: float, height: float, grid: tuple[int, int] = (1, 1), **options: Any) -> tuple[Figure, Axes]:
    """Make a figure of this many inches; return it and the first of its axes.

    Args:
        width, height: in inches.
        grid: rows and columns of axes.
        options: of `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    # not pyplot: that would choose a window system, and keep every figure of a long run
    figure = Figure((width, height), layout="constrained")
    for axes in figure.subplots(*grid, squeeze=False, **options).flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, figure.axes[0]


def picture_format(path: str | Path) -> str:
    """Read off a file's name what it asks for, "png" or "svg". Call it before long work, so that none is lost.

    Raises:
        HeteroError: another kind of file, or no such folder.
    """
    file = Path(path)
    if file.suffix not in (".png", ".svg"):
        raise HeteroError(f"{path}: pictures are drawn as .png or .svg.")
    if not os.path.isdir(file.parent):
        raise HeteroError(f"{path}: there is no folder {str(file.parent)!r}. Make it first.")
    if os.path.isdir(file):
        raise HeteroError(f"{path}: there is a folder of this name. Name a file.")
    return file.suffix[1:]


def write_picture(make: Callable[[], Figure], path: str | Path) -> None:
    """Draw a figure into a .png or .svg file.

    Raises:
        HeteroError: another kind of file, one that cannot be written, no such folder, or no matplotlib.
    """
    written(rendered(make, picture_format(path)), path)


def written(content: bytes, path: str | Path) -> None:
    """Write a file that is for people.

    Raises:
        HeteroError: the file cannot be written.
    """
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise HeteroError(f"Cannot write {str(path)!r}: {error.strerror}. Name another file.") from error


def printable(text: str) -> str:
    """Make a name from somewhere else one that a picture can show."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def rendered(make: Callable[[], Figure], file_format: str) -> bytes:
    """Draw a figure as the bytes of a png or svg file.

    Raises:
        HeteroError: no matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise HeteroError("Pictures need matplotlib: pip install hf-hetero[report]") from error
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):  # `make` runs inside it: a style counts when things are created
        make().savefig(buffer, format=file_format, dpi=160, metadata={"Date": None} if file_format == "svg" else None)
    return buffer.getvalue()
