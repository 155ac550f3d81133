"""These hooks let pages include parts of the repository's READMEs, and put all of them under source/, links kept."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "source"
"""Where the repository's pages stand in the site, at their own paths."""
LEFT_OUT = {"docs", "outputs", "build", "dist", "node_modules"}
SHOWN = (".md", ".png", ".svg")
INCLUDE = re.compile(r"^<!-- include (\S+?)(?:#(.+?))? -->$", re.MULTILINE)
LINK = re.compile(r"(!?\[[^\]\n]*\])\(([^()\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the repository's pages and pictures; links among them stay as they are."""
    for path in _repository_files():
        files.append(File.generated(config, f"{SOURCE}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in what a page includes, and send links to code, which has no page, to nowhere: its path is enough."""
    here = page.file.src_uri

    def included(found: re.Match[str]) -> str:
        path, heading = found[1], found[2]
        text = (ROOT / path).read_text(encoding="utf-8")
        return _moved(_section(text, heading, path), f"{SOURCE}/{path}", here)

    markdown = INCLUDE.sub(included, markdown)
    return LINK.sub(lambda link: _kept(link, here, files), markdown)


def _repository_files() -> list[str]:
    """List the pages and pictures of the repository; links to folders are not followed, so each is there once."""
    found: list[str] = []
    for folder, names, file_names in os.walk(ROOT):
        names[:] = sorted(name for name in names if name not in LEFT_OUT and not name.startswith("."))
        found += [os.path.relpath(os.path.join(folder, name), ROOT) for name in file_names if name.endswith(SHOWN)]
    return sorted(path.replace(os.sep, "/") for path in found)


def _section(text: str, heading: str | None, path: str) -> str:
    """Return what stands under a heading of a page, or all below its title.

    Raises:
        PluginError: the page has no such heading; the build ends with it.
    """
    lines = text.splitlines()
    if heading is None:
        return "\n".join(lines[1:])
    marks = [(n, line.split(" ", 1)) for n, line in _headings(lines)]
    for place, (number, (mark, title)) in enumerate(marks):
        if title == heading:
            after = [n for n, (other, _) in marks[place + 1 :] if len(other) <= len(mark)]
            return "\n".join(lines[number + 1 : after[0] if after else len(lines)])
    raise PluginError(f"{path} has no heading {heading!r}")


def _headings(lines: list[str]) -> list[tuple[int, str]]:
    """List the headings of a page; a comment in a block of code is none."""
    found: list[tuple[int, str]] = []
    in_code = False
    for number, line in enumerate(lines):
        in_code ^= line.startswith("```")
        if not in_code and re.match(r"#{1,6} ", line):
            found.append((number, line))
    return found


def _moved(text: str, there: str, here: str) -> str:
    """Let a text's links, which are relative to its own page, lead from another one to the same places."""

    def moved(link: re.Match[str]) -> str:
        target, hash_, anchor = link[2].partition("#")
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(there), target)) if target else there
        return f"{link[1]}({posixpath.relpath(place, posixpath.dirname(here) or '.')}{hash_}{anchor})"

    return LINK.sub(moved, text)


def _kept(link: re.Match[str], here: str, files: Files) -> str:
    """Keep a link that leads to a page or a picture, a folder's README included; leave the words of others.

    A target that is nowhere in the repository, either, stays, so that the strict build refuses it.
    """
    target, hash_, anchor = link[2].partition("#")
    if "://" in target or not target:
        return link[0]
    place = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    if files.get_file_from_path(place) is not None:
        return link[0]
    if files.get_file_from_path(f"{place}/README.md") is not None:
        return f"{link[1]}({target.rstrip('/')}/README.md{hash_}{anchor})"
    is_code = place.startswith(f"{SOURCE}/") and (ROOT / place.removeprefix(f"{SOURCE}/")).exists()
    return link[1].strip("[]") if is_code else link[0]
