"""A person at a terminal gets tables, everything else the lines; neither waits for what draws them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from costs.test_cost_model import a_cost_model
from screens import on_a_terminal, screen

ROOT = Path(__file__).parents[2]
CLI = "import sys; from hf_hetero.cli import main; code = main(sys.argv[1:]); {after}; sys.exit(code)"


def environment(**changes: str) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "COLUMNS", "LINES"}}
    return {**known, "TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **changes}


def seen(words: Sequence[str], columns: int, environ: Mapping[str, str], after: str = "pass") -> str:
    """All that a command writes to a terminal of this width."""
    return on_a_terminal(CLI.format(after=after), columns, environ, words)


def piped(words: Sequence[str], environ: Mapping[str, str], after: str = "pass") -> str:
    """All that a command writes into a pipe."""
    command = [sys.executable, "-c", CLI.format(after=after), *words]
    return subprocess.run(command, env=dict(environ), stdout=subprocess.PIPE, check=True, text=True).stdout


@pytest.fixture
def simulate(tmp_path: Path) -> list[str]:
    """A comparison of two steps."""
    (tmp_path / "lengths.txt").write_text("\n".join(map(str, [150, 20, 30, 40, 7, 90, 1])))
    a_cost_model().save(tmp_path / "cost.json")
    where = [str(tmp_path / "lengths.txt"), "--cost", str(tmp_path / "cost.json")]
    return ["simulate", *where, "--ranks", "4", "--batch-size", "3", "--solver", "fast"]


def untimed(line: str) -> str:
    return re.sub(r"[\d.]+ ms", "MS", line)


def test_tables_in_a_terminal_and_lines_elsewhere(simulate: list[str]) -> None:
    """Both have the same cells; the screen's are in a frame, and no bar of the planning is left between them."""
    bars = "from hf_hetero import progress; progress.DELAY_S = 0\n"
    written = on_a_terminal(bars + CLI.format(after="pass"), 120, environment(), simulate)
    assert "Planning:" in written
    shown = [line for line in screen(written, 120) if line]
    lines = piped(simulate, environment()).splitlines()
    assert shown[0].startswith("╭─")
    assert [line.strip("│ ").replace("│", " ").split() for line in shown[4:-3]] == [
        line.split() for line in lines[1:-2]
    ]
    assert [untimed(line) for line in shown[-2:]] == [untimed(line) for line in lines[-2:]]


def test_a_terminal_that_cannot_draw(simulate: list[str]) -> None:
    """It gets the lines, and no colours."""
    shown = seen(simulate, 300, environment(TERM="dumb")).replace("\r\n", "\n")
    lines = piped(simulate, environment())
    assert untimed(shown[shown.index("way ") :]) == untimed(lines)
    assert "\x1b" not in shown[shown.index("way ") :]


def test_rich_is_imported_to_draw_only(simulate: list[str]) -> None:
    """Neither lines nor the help wait for it; a terminal does."""
    after = "print('rich' in sys.modules)"
    assert piped(simulate, environment(), after).splitlines()[-1] == "False"
    assert seen(simulate, 80, environment(), after=after).split()[-1] == "True"
    code = "from hf_hetero.cli import _parser\nimport sys; _parser().format_help(); print('rich' in sys.modules)"
    assert on_a_terminal(code, 80, environment()).split() == ["False"]


WITHOUT_RICH = """
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *package: None if name == "rich" else find(name, *package)
"""


def test_without_rich_there_are_lines(simulate: list[str], tmp_path: Path) -> None:
    """A broken installation costs the tables, not the answer."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT_RICH)
    without = environment(PYTHONPATH=os.pathsep.join([str(tmp_path / "site"), str(ROOT), *sys.path]))
    assert importlib.util.find_spec("rich") is not None
    assert "╭" not in seen(simulate, 120, without)
    assert "╭" in seen(simulate, 120, environment())


SAYS = r"""
from hf_hetero.terminal.blocks import Fact
from hf_hetero.terminal.show import show, show_error
show(Fact("wrong", "mod\x1b[2Jel"))
show_error("hf-hetero: \x1b[2J")
"""


@pytest.mark.parametrize("kind", ["dumb", "xterm"])
def test_words_of_others_steer_no_terminal(kind: str) -> None:
    """They are escapes where a terminal reads them, one that cannot draw, too; a pipe gets every letter."""
    shown = on_a_terminal(SAYS, 80, environment(TERM=kind))
    assert screen(shown, 80)[:2] == [r"wrong     mod\x1b[2Jel", r"hf-hetero: \x1b[2J"]
    assert "\x1b[2J" not in shown
    done = subprocess.run([sys.executable, "-c", SAYS], env=environment(TERM=kind), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("wrong     mod\x1b[2Jel\n", "hf-hetero: \x1b[2J\n")
