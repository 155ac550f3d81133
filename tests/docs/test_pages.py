"""Pages of the site hold code that runs, commands that work, messages that exist, and parts that are there."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_hetero import errors
from hf_hetero.cli import main

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "pages").glob("*.md"))
TEXTS = {page.stem: page.read_text(encoding="utf-8") for page in PAGES}
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if blocks(text, "python")])
def test_python_on_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, one after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page}
    for block in blocks(TEXTS[page], "python"):
        exec(compile(block, f"{page}.md", "exec"), names)


def commands(text: str) -> list[str]:
    """The commands of a page's console blocks that name no place to be filled in."""
    lines = [line for block in blocks(text, "console") for line in block.splitlines()]
    return [
        line[2:].split("  #")[0] for line in lines if line.startswith("$ hf-hetero") and not PLACEHOLDER.search(line)
    ]


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if commands(text)])
def test_commands_on_a_page_work(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each ends with 0 and prints something."""
    monkeypatch.chdir(tmp_path)
    for command in commands(TEXTS[page]):
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- messages


@cache
def said_by_the_code() -> str:
    """Every text in the package and the recipes' scripts, each in a line; what is filled in is left out."""
    folders = ("hf_hetero", "collators", "callbacks", "recipes")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    constants = (
        node.value
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return "\n".join(" ".join(constant.split()) for constant in constants)


def unknown_parts(message: str) -> list[str]:
    """Parts of a message, between what is filled in, that the code says nowhere."""
    names = {name for name in dir(errors) if name[0].isupper()}
    parts = [part.strip() for part in message.split("...")]
    return [part for part in parts if part and part not in names and part not in said_by_the_code()]


def test_messages_are_those_of_the_code() -> None:
    """What the table of messages has is what the code says, so that a search for it finds the row."""
    table = TEXTS["troubleshooting"].partition("## ")[0]
    messages = [message for row in table.splitlines() for message in re.findall(r"^\| `([^`]*)`", row)]
    assert len(messages) > 8
    assert not [message for message in messages if unknown_parts(message)]


def test_a_message_that_nobody_says_is_seen() -> None:
    """The check above finds one, whole or in part."""
    assert unknown_parts("ConfigError") == []
    assert unknown_parts("shifts labels on its own ... never said by anyone") == ["never said by anyone"]


# ---------------------------------------------------------------------------------------------------------------- parts


def headings(path: str) -> set[str]:
    text = re.sub(r"^```.*?^```", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return set(re.findall(r"^#+ (.+)$", text, re.MULTILINE))


def missing_parts(text: str) -> list[str]:
    """What a page includes that is not there: a file, or a heading of it."""
    included = re.findall(r"^<!-- include (\S+?)(?:#(.+?))? -->$", text, re.MULTILINE)
    return [
        f"{path}#{heading}"
        for path, heading in included
        if not (ROOT / path).is_file() or (heading and heading not in headings(path))
    ]


def test_what_pages_include_is_there() -> None:
    """Parts of READMEs are named by their headings; one that is renamed is found here, not by a reader."""
    assert not [part for text in TEXTS.values() for part in missing_parts(text)]
    assert missing_parts("<!-- include README.md#No such heading -->") == ["README.md#No such heading"]
    assert missing_parts("<!-- include nowhere.md -->") == ["nowhere.md#"]


def test_every_page_is_in_the_table_of_contents() -> None:
    """And every entry of it is a page, of the site or of the repository."""

    def leaves(entries: Any) -> list[str]:
        if isinstance(entries, str):
            return [entries]
        inner = [next(iter(entry.values())) if isinstance(entry, dict) else entry for entry in entries]
        return [leaf for entry in inner for leaf in leaves(entry)]

    named = leaves(yaml.safe_load((ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    own = [name for name in named if not name.startswith("source/")]
    assert sorted(own) == sorted(page.name for page in PAGES)
    assert all((ROOT / name.removeprefix("source/")).is_file() for name in named if name.startswith("source/"))
