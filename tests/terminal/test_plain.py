"""Files and pipes get the lines that they got before a terminal got tables: scripts read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from terminal.told import CHECK, COST, LENGTHS, MACHINES, PLAN, SIMULATION, TRAINED

from hf_hetero.report.tables import check_table, estimate_table, plan_table, simulation_table
from hf_hetero.terminal.blocks import Block, Entry, Fact, Line, Table, number, words
from hf_hetero.terminal.plain import plain

LINES = Path(__file__).with_name("lines")
"""What the functions printed when they wrote lines, and knew no tables."""


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("plan", [plan_table(PLAN, LENGTHS, COST)]),
        ("simulation", [simulation_table(SIMULATION)]),
        ("check", check_table(CHECK, "80 GiB, weights sharded over 8 ranks")),
        ("estimate", estimate_table(COST, 64, TRAINED, MACHINES)),
    ],
)
def test_lines_are_what_they_were(name: str, blocks: list[Block]) -> None:
    """Letter by letter, blanks at the ends of lines included."""
    assert plain(blocks) + "\n" == (LINES / f"{name}.txt").read_text(encoding="utf-8")


def test_other_parts() -> None:
    """A table without titles has no head, columns are as wide as their longest cell; entries and facts are indented."""
    blocks = [
        Table((words(), words(gap=2)), (("a", "one"), ("long", ""))),
        Entry("name", "said of it", 12),
        Fact("data", "as it is, however long"),
        Line(),
        Line("[red]end\x1b[0m"),
    ]
    assert plain(blocks).split("\n") == [
        *("a     one", "long"),
        *("name", "    said of", "    it"),
        *("data      as it is, however long", "", "[red]end\x1b[0m"),
    ]


def test_a_table_is_refused_that_is_none() -> None:
    """Rows have a cell for each column, and the key is one of these."""
    with pytest.raises(ValueError, match="has 1 cells; the table has 2 columns"):
        Table((words(), number()), (("a",),))
    with pytest.raises(ValueError, match="key is column 2"):
        Table((words(), number()), (("a", "1"),), key=2)
