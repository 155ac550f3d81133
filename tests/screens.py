"""A terminal for tests: what a person sees after a program has written to it, line by line."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence

PARTS = re.compile(r"\x1b\[([\d;]*)([A-Za-z])|([\r\n\b])|([^\x1b\r\n\b]+)")


def screen(written: str, columns: int) -> list[str]:
    """Lines that stand on a terminal of this width: carriage returns, moves up, erasures and wrapping are obeyed.

    Nothing scrolls away: the lines of all that was written are returned, as one sees them by scrolling back.
    """
    lines: list[list[str]] = [[]]
    row = column = 0
    for number, letter, control, text in PARTS.findall(written):
        if control == "\r":
            column = 0
        elif control == "\n":
            row, column = row + 1, 0
        elif control == "\b":
            column = max(0, column - 1)
        elif letter == "A":
            row = max(0, row - int(number or 1))
        elif letter == "K":
            del lines[row][column:]
        elif text:
            for sign in text:
                if column == columns:  # wrapped when the next letter comes, as terminals do
                    row, column = row + 1, 0
                while row >= len(lines):
                    lines.append([])
                lines[row] += [" "] * (column + 1 - len(lines[row]))
                lines[row][column] = sign
                column += 1
        while row >= len(lines):
            lines.append([])
    return ["".join(line).rstrip() for line in lines]


def on_a_terminal(code: str, columns: int, environment: Mapping[str, str], options: Sequence[str] = ()) -> str:
    """Run Python code in a process whose outputs are a terminal of this width; return all that it wrote there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    command = [sys.executable, "-c", code, *options]
    # these would be believed before the terminal; the packages that tests import may set them
    own = {name: value for name, value in environment.items() if name not in {"COLUMNS", "LINES"}}
    running = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=own)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux says so when the other side is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert running.wait(60) == 0, written.decode(errors="replace")
    return written.decode()
