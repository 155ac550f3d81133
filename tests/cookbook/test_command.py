"""`hf-hetero recipes`: list, show and copy say and write what the recipes have; a check is in `test_check`."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_hetero.cli import main
from hf_hetero.cookbook.shelf import shelf


def test_list_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    """Its name, and what it is about."""
    assert main(["recipes", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [recipe.name for recipe in shelf()]
    assert all(line.endswith(recipe.about) for line, recipe in zip(lines, shelf(), strict=True))


def test_list_needs_no_torch() -> None:
    """Neither do show and copy: they start at once."""
    code = (
        "import sys; from hf_hetero.cli import main; assert main(['recipes', 'list']) == 0; "
        "print([name for name in ('torch', 'datasets', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_show_has_page_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """Both as they are."""
    recipe = shelf()[0]
    assert main(["recipes", "show", recipe.name]) == 0
    printed = capsys.readouterr().out
    assert recipe.readme.read_text(encoding="utf-8") in printed
    assert printed.endswith(recipe.settings.read_text(encoding="utf-8"))


def test_copy_says_what_starts_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command names files that were written, with the changes; a second copy does not overwrite them."""
    words = ["recipes", "copy", "quickstart_cpu", "-o", str(tmp_path / "mine"), "--set", "lora_r=8"]
    assert main(words) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:3] == ["accelerate", "launch", "--config_file"]
    assert all(Path(command[place]).is_file() for place in (3, 4, 6))
    assert yaml.safe_load(Path(command[6]).read_text(encoding="utf-8"))["lora_r"] == 8
    (tmp_path / "mine" / "README.md").write_text("mine")
    assert main(words) == 1
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"


@pytest.mark.parametrize("words", [["show", "nothing"], ["copy", "nothing", "-o", "x"], ["check", "nowhere.yaml"]])
def test_what_is_not_there_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Status 1, and the name."""
    assert main(["recipes", *words]) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert words[1] in printed.err
