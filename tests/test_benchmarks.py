"""Every benchmark starts, and pages name what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").rglob("*.py")}
BENCHMARKS = sorted(path for path, source in FILES.items() if '__name__ == "__main__"' in source)
PATHS = r"(?:[`(]|python )((?:benchmarks|callbacks|collators|hf_hetero|recipes|tests)/[\w/*.-]*\w)[`) ]"
PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "outputs"} & set(path.relative_to(ROOT).parts))


@pytest.mark.slow
@pytest.mark.parametrize("path", BENCHMARKS)
def test_a_benchmark_starts(path: str, tmp_path: Path) -> None:
    """Run from any folder, it says what it can be asked."""
    done = subprocess.run([sys.executable, str(ROOT / path), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path in done.stdout, "its docstring must give the command"


def test_the_tables_name_every_benchmark() -> None:
    """benchmarks/README.md, and that of the stages of `make gpu`, have one row for each script, and no other."""
    pages = [(ROOT / "benchmarks" / page).read_text(encoding="utf-8") for page in ("README.md", "gpu/README.md")]
    rows = re.findall(r"^\| `python (benchmarks/\S+\.py)", "\n".join(pages), re.MULTILINE)
    assert sorted(rows) == BENCHMARKS


def test_what_benchmarks_share_is_named() -> None:
    """A file that is no script is named in its folder's page."""
    shared = sorted(FILES.keys() - set(BENCHMARKS))
    assert shared
    for path in shared:
        assert path in (ROOT / path).parent.joinpath("README.md").read_text(encoding="utf-8")


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
