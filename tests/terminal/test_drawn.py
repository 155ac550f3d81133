"""In a terminal, tables are tables: within its width, with every number whole, and words of others do nothing."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence

import pytest
from screens import screen
from terminal.told import CHECK, COST, LENGTHS, MACHINES, PLAN, SIMULATION, TRAINED

from hf_hetero.report.tables import check_table, costs_table, estimate_table, plan_table, simulation_table
from hf_hetero.terminal.blocks import Block, Entry, Fact, Line, Table, number, words
from hf_hetero.terminal.drawn import draw
from hf_hetero.terminal.literal import literal

TOLD: dict[str, Sequence[Block]] = {
    "plan": [plan_table(PLAN, LENGTHS, COST)],
    "simulation": [simulation_table(SIMULATION)],
    "check": check_table(CHECK, "80 GiB, weights sharded over 8 ranks"),
    "estimate": estimate_table(COST, 64, TRAINED, MACHINES),
    "costs": costs_table(),
}
HOSTILE = "[red]x[/red]:smile:\x1b[2J\x1b]0;title\x07\r\x9b1A\u202etxt"
SHOWN = r"[red]x[/red]:smile:\x1b[2J\x1b]0;title\x07\x0d\x9b1A\u202etxt"


def drawn(blocks: Sequence[Block], width: int, encoding: str = "utf-8") -> str:
    """All that is written to a terminal of this width."""
    written = io.BytesIO()
    file = io.TextIOWrapper(written, encoding, newline="")
    draw(blocks, file, width)
    file.flush()
    return written.getvalue().decode(encoding)


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal with colours, whatever runs the tests."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.mark.parametrize("width", [40, 60, 80, 140])
@pytest.mark.parametrize("name", TOLD)
def test_it_fits_and_nothing_is_cut(name: str, width: int) -> None:
    """No line is wider than the terminal; every cell of numbers is there whole, every word of the others in order."""
    lines = screen(drawn(TOLD[name], width), 1000)
    assert max(map(len, lines)) <= width
    text = re.sub(r"[╭╮╰╯├┤┬┴┼│─]", " ", "\n".join(lines))
    seen = text.split()
    assert "…" not in text
    for block in TOLD[name]:
        if isinstance(block, Table):
            for row in block.rows:
                for cell, column in zip(row, block.columns, strict=True):
                    assert column.is_text or not cell or cell in seen, cell
                    assert set(cell.split()) <= set(seen), cell
            said = [block.title, *block.notes]
        else:
            said = [block.said] if isinstance(block, Line) else [block.said, getattr(block, "name", "")]
        for sentence in said:
            assert " ".join(sentence.split()) in " ".join(seen)


def test_a_plan_in_a_terminal() -> None:
    """The frame, the units below the titles, words to the left and numbers to the right."""
    assert screen(drawn(TOLD["plan"], 80), 80)[:6] == [
        "╭─────────────┬─────────┬─────────┬─────────┬───────────╮",
        "│             │         │         │         │   seconds │",
        "│ micro-batch │ degrees │ samples │  tokens │ predicted │",
        "├─────────────┼─────────┼─────────┼─────────┼───────────┤",
        "│           0 │ 4       │       1 │ 150,000 │    60.475 │",
        "│           1 │ 2 1x2   │       6 │     188 │     0.109 │",
    ]


def test_a_terminal_too_narrow_for_all_columns() -> None:
    """What does not fit goes below, with the column that says what a row is about; rows without more are left out."""
    table = Table(
        (words("way"), number("seconds"), number("tokens"), words("note")),
        (("static", "1,234.5", "1,000,000", ""), ("dynamic", "2", "3", "tuned")),
    )
    assert screen(drawn([table], 20), 20) == [
        "way      seconds",
        "────────────────",
        "static   1,234.5",
        "dynamic        2",
        "",
        "way         tokens",
        "──────────────────",
        "static   1,000,000",
        "dynamic          3",
        "",
        "way      note",
        "──────────────",
        "dynamic  tuned",
        "",
    ]
    assert screen(drawn([table], 10), 1000)[2] == "static   1,234.5"  # the terminal wraps it; it is all there


@pytest.mark.parametrize("width", [40, 140])
def test_words_of_others_do_nothing(width: int) -> None:
    """A name with markup, an emoji's, escape sequences or a turn of direction is shown, wherever it stands."""
    blocks: list[Block] = [
        Table((words(HOSTILE, unit=HOSTILE), number("n")), ((HOSTILE, "1"),), HOSTILE, (HOSTILE,)),
        Fact("wrong", HOSTILE, tone="bad"),
        Entry(HOSTILE, HOSTILE, 100),
        Line(HOSTILE),
    ]
    written = drawn(blocks, width)
    colours = set(re.findall(r"\x1b\[[\d;]*m", written))
    assert "\x1b" not in re.sub(r"\x1b\[[\d;]*m", "", written)
    assert colours <= {f"\x1b[{code}m" for code in ("0", "1", "2", "36", "31", "1;31")}
    assert not set("\r\x07\x9b\u202e") & set(written)
    parts = "".join(line.strip("│ ") for line in screen(written, 1000))
    assert re.sub("[│╭╮╰╯├┤┬┴┼─ ]", "", parts).count(SHOWN.replace(" ", "")) >= 6
    assert literal(HOSTILE) == SHOWN


def test_letters_that_a_terminal_lacks() -> None:
    """In ASCII, frames are of its signs, and other letters are escapes, as wide as they are drawn."""
    lines = screen(drawn([Table((words("name"), number("n")), (("Größe", "1"), ("x", "22")))], 80, "ascii"), 80)
    assert any(r"Gr\xf6\xdfe" in line for line in lines)
    assert len({len(line) for line in lines if line}) == 1


def test_wide_letters() -> None:
    """A letter that takes two columns counts as two."""
    lines = screen(drawn([Table((words("name"), number("n")), (("日本", "1"), ("four", "22")))], 80), 80)
    assert lines[3:5] == ["│ 日本 │  1 │", "│ four │ 22 │"]


def test_colours_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Good and bad news differ in colour; with NO_COLOR there is none, and words still say it."""
    news = [Fact("wrong", "it is", tone="bad"), Fact("verdict", "it is not", tone="good")]
    assert "\x1b[31m" in drawn(news, 80)
    assert "\x1b[32m" in drawn(news, 80)
    monkeypatch.setattr("rich.console.Console._environ", dict(os.environ))  # as rich was imported
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.findall(r"\x1b\[(?:\d;)*3\d", drawn([*news, *TOLD["plan"]], 80))
    assert screen(drawn(news, 80), 80)[:2] == ["wrong     it is", "verdict   it is not"]
