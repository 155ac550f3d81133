"""Long work says how far it is: in lines where there is no terminal, in a bar that vanishes where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from screens import on_a_terminal, screen

from hf_hetero import progress
from hf_hetero.progress import each, shows_bars


def test_lines_say_how_far(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nothing can be redrawn, a line on stderr says how much is done; every item is given once."""
    assert not shows_bars()
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    assert list(each(range(3), "Counting tokens", "rows")) == [0, 1, 2]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [f"Counting tokens: {done} of 3 rows" for done in (1, 2, 3)]


def test_what_is_quick_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does a rank that shall not speak."""
    assert list(each(range(3), "Counting tokens", "rows")) == [0, 1, 2]
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    with progress.progress(3, "Counting tokens", "rows", is_shown=False) as count:
        count(3)
    assert capsys.readouterr().err == ""


def test_a_bar_vanishes() -> None:
    """In a terminal a bar is drawn while the work goes on, and is gone when it is done."""
    code = (
        "import time; from hf_hetero import progress\n"
        "progress.DELAY_S = 0\n"
        "for _ in progress.each(range(5), 'Counting tokens', 'rows'): time.sleep(0.11)\n"
        "progress.say('done')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    written = on_a_terminal(code, 100, environment)
    assert "Counting tokens:  " in written
    assert "/5 [" in written
    assert [line for line in screen(written, 100) if line] == ["done"]


def test_a_line_is_wrapped_between_words() -> None:
    """A narrow terminal has whole words in each of its lines; a pipe has the line as it is."""
    line = "step    1  [4] [2 1x2]     planned   3.718 s  waited 0.46 s for its plan"
    code = f"from hf_hetero.progress import say; say({line!r}); say('short\\n  lines')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    shown = screen(on_a_terminal(code, 40, environment), 40)
    assert shown[:4] == [
        "step    1  [4] [2 1x2]     planned",
        "   3.718 s  waited 0.46 s for its plan",
        "short",
        "  lines",
    ]
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{line}\nshort\n  lines\n"
