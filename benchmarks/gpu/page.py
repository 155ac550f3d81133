"""The page of all results: Markdown from the one JSON that `run` keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FORMAT = "hf-hetero-gpu/1"


def page(results: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        results: "stages": name -> what `stage.Stage` has noted, and what `run` knows of its end.
        titles: of the stages, in their order.
    """
    stages: dict[str, Any] = results["stages"]
    rows = [
        {
            "stage": name,
            "state": found["state"],
            "seconds": found["seconds"],
            "device": found["device"],
            "date": found["date"],
        }
        for name in titles
        if (found := stages.get(name))
    ]
    rows += [{"stage": name, "state": "not measured yet"} for name in titles if name not in stages]
    parts = ["# What one GPU shows", "Made by `make gpu`; nothing here is edited by hand.", _table(rows)]
    said = {_versions(found["versions"]) for found in stages.values()}
    parts += [f"Versions: {text}." for text in sorted(said)]
    for name, title in titles.items():
        if name in stages:
            parts += [f"## {title}", *_section(stages[name])]
    return "\n\n".join(parts) + "\n"


def _section(found: Mapping[str, Any]) -> list[str]:
    """What one stage has noted."""
    parts: list[str] = []
    if found["state"] != "done":
        parts.append(f"**{found['state']}**")
    if found["facts"]:
        parts.append(_table([{"": name, "value": value} for name, value in found["facts"].items()]))
    for title, rows in found["tables"].items():
        parts += [f"### {title}", _table(rows)]
    if found["notes"]:
        parts.append("\n".join(f"- {_cell(note)}" for note in found["notes"]))
    return parts


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows under the names of all their columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(_cell(row.get(name)) for name in names)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """A value without what would end its cell; empty for what was not measured."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value)) or "none"
    return str(value).replace("|", "/").replace("\n", " ")


def _versions(versions: Mapping[str, str]) -> str:
    """Names and versions in one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
