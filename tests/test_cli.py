"""The command line gives what the library returns, and one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cost_model import a_cost_model

from hf_hetero import Plan
from hf_hetero.cli import main

LENGTHS = [150, 20, 30, 40, 7, 90, 1]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "lengths.txt").write_text("\n".join(map(str, LENGTHS)) + "\n\n")
    a_cost_model().save(tmp_path / "cost.json")
    return [str(tmp_path / "lengths.txt"), "--cost", str(tmp_path / "cost.json"), "--ranks", "4"]


def test_plan_as_json(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """--json is a plan in its documented format, of all samples."""
    assert main(["plan", *files, "--json"]) == 0
    plan = Plan.from_dict(json.loads(capsys.readouterr().out))
    assert plan.num_samples == len(LENGTHS)
    assert plan.seconds == pytest.approx(a_cost_model().plan_seconds(plan, LENGTHS))
    assert plan.lower_bound_s <= plan.seconds


def test_plan_as_table(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The table counts all samples and tokens, and says how far from optimal the plan may be."""
    assert main(["plan", *files]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in printed[1:-1]]
    assert sum(int(row[-2].replace(",", "")) for row in rows) == sum(LENGTHS)
    assert "of optimal" in printed[-1]


def test_plan_as_picture(files: list[str], tmp_path: Path) -> None:
    """--plot draws the plan."""
    assert main(["plan", *files, "--plot", str(tmp_path / "plan.svg")]) == 0
    assert "<svg" in (tmp_path / "plan.svg").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": "12\nmany\n"}, "line 2: 'many' is not a whole number"),
        ({"lengths": "999999\n"}, "999999 tokens"),
        ({"lengths": "0\n"}, "0"),
        ({"lengths": None}, "Cannot read the lengths"),
        ({"cost": "{}"}, "format None is unknown"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    files: list[str], change: dict[str, str | None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 1, nothing on stdout, one line that names the value."""
    for name, text in change.items():
        path = Path(files[0] if name == "lengths" else files[2])
        path.unlink() if text is None else path.write_text(text)
    assert main(["plan", *files]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_simulate(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A line a way for people, the totals for programs; the same seed gives the same batches."""
    command = ["simulate", *files, "--batch-size", "3", "--steps", "2"]
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["num_steps"], data["num_samples"]) == (2, 6)
    assert main(command) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:-1]] == list(data["ways"])
    assert main([*command, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["ways"] == data["ways"]


def test_simulate_nothing(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A batch size of zero is named."""
    assert main(["simulate", *files, "--batch-size", "0"]) == 1
    assert "--batch-size 0" in capsys.readouterr().err
