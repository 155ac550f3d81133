"""Every benchmark starts, and pages name what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").rglob("*.py"))
PATHS = r"(?:[`(]|python )((?:benchmarks|callbacks|collators|hf_hetero|recipes|tests)/[\w/*.-]*\w)[`) ]"
PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "outputs"} & set(path.relative_to(ROOT).parts))


@pytest.mark.slow
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
def test_pages_name_files_that_exist(page: Path) -> None:
    """A path that a page names, in a command, too, is there."""
    said = " ".join(page.read_text(encoding="utf-8").split())
    missing = [path for path in re.findall(PATHS, said) if not list(ROOT.glob(path))]
    assert not missing


def test_a_path_that_is_not_there_is_seen() -> None:
    """Paths are found in backticks and in commands."""
    assert re.findall(PATHS, "Run `python tests/nowhere.py`, or (tests/a/*.py) of `hf_hetero/b/c.py`.") == [
        "tests/nowhere.py",
        "tests/a/*.py",
        "hf_hetero/b/c.py",
    ]
