"""The site is built by `make docs`, which refuses a link that leads nowhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from browser import browser_path, browsing

ROOT = Path(__file__).parents[2]


def built(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Run the command of the Makefile, with another file of settings."""
    command = re.search(r"-m (mkdocs build .*?) --config-file", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert command is not None
    words = [sys.executable, "-m", *shlex.split(command[1]), "--config-file", str(config), "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("added", "refused"),
    [
        ("", ""),
        ("[a](nowhere.md)", "nowhere.md"),
        ("[b](source/hf_hetero/nothing.py)", "nothing.py"),
        ("[c](concepts.md#no-such)", "#no-such"),
        ("<!-- include README.md#No such heading -->", "No such heading"),
    ],
    ids=["as it is", "a page", "a file", "an anchor", "a part"],
)
def test_a_link_to_nowhere_ends_the_build(added: str, refused: str, tmp_path: Path) -> None:
    """Pages as they are become a site with the API on it; with a bad link, or a part that is not there, they do not."""
    pytest.importorskip("mkdocs")
    shutil.copytree(ROOT / "docs" / "pages", tmp_path / "pages")
    with (tmp_path / "pages" / "nodes.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{added}\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"INHERIT: {ROOT / 'docs' / 'mkdocs.yml'}\nhooks: [{ROOT / 'docs' / 'hooks.py'}]\n")
    done = built(config, tmp_path / "site")
    said = done.stdout + done.stderr
    assert (done.returncode == 0) == (not added), said
    assert refused in said
    if not added:
        api = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
        assert all(name in api for name in ("HeteroTrainer", "Planner", "CollectiveFailed", "PackedCollator"))
        assert "<!-- include" not in (tmp_path / "site" / "concepts" / "index.html").read_text(encoding="utf-8")
        if (chromium := browser_path()) is not None:
            look_at_tables(chromium, tmp_path / "site" / "source" / "callbacks" / "index.html")


def look_at_tables(chromium: str, page: Path) -> None:
    """Names stand in one line, on a phone as well; what is wider than the window scrolls by itself."""
    names = "[...document.querySelectorAll('td code')].filter(e => !/[ ,/.-]/.test(e.textContent))"
    with browsing(chromium) as tab:
        for width in (1400, 400):
            tab.look(width)
            tab.open(page, ready="true")
            assert tab.run(f"{names}.length") > 10
            assert tab.run(f"{names}.filter(e => e.getClientRects().length > 1).map(e => e.textContent)") == []
            assert tab.run("document.documentElement.scrollWidth") <= width
