"""Every benchmark starts, and is named where its numbers are quoted."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").rglob("*.py"))
PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "outputs"} & set(path.relative_to(ROOT).parts))


@pytest.mark.parametrize("path", BENCHMARKS)
def test_a_benchmark_starts(path: str, tmp_path: Path) -> None:
    """Run from any folder, it says what it can be asked."""
    done = subprocess.run([sys.executable, str(ROOT / path), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path in done.stdout, "its docstring must give the command"


def test_the_table_names_every_benchmark() -> None:
    """benchmarks/README.md has one row for each script, and no other."""
    table = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `python (benchmarks/\S+\.py)", table, re.MULTILINE)) == BENCHMARKS


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_files_that_exist(page: Path) -> None:
    """A command that a page gives can be run: its script is there."""
    said = " ".join(page.read_text(encoding="utf-8").split())
    for script in re.findall(r"python ((?:benchmarks|tests|recipes)/\S+?\.py)", said):
        assert (ROOT / script).exists(), f"{page.name} names {script}"
