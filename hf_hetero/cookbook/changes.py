"""This module changes values of a recipe's settings, and copies a recipe to where a user can change it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_hetero.cookbook.shelf import SETTINGS, Recipe
from hf_hetero.errors import ConfigError

LINE_OF_A_KEY = re.compile(r"^([A-Za-z_]\w*):(.*?)(\s+#.*)?$")
INDENT = 37
"""Columns before a comment, as in the recipes that come with the package."""


def values_said(words: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` words; values are what they would be in a YAML file.

    Raises:
        ConfigError: a word is no `key=value`.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"--set {word!r:.60}: write key=value, such as --set max_length=32768.")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {word!r:.60}: {value!r:.60} is no YAML value.") from error
    return values


def changed(text: str, values: Mapping[str, Any]) -> str:
    """Return a file of settings with other values: each at its place, with its comment; new keys stand at the end.

    A value of None takes the key out.
    """
    kept, left, skipping = list[str](), dict(values), False
    for line in text.splitlines():
        found = LINE_OF_A_KEY.match(line)
        if found is None:
            # what is indented belongs to the key before it, and goes with it
            skipping = skipping and line.startswith((" ", "-"))
            if not skipping:
                kept.append(line)
            continue
        key, _, comment = found.groups()
        skipping = key in left
        if not skipping:
            kept.append(line)
        elif (value := left.pop(key)) is not None:
            kept.append(_line(key, value, (comment or "").strip()))
    kept += [_line(key, value) for key, value in left.items() if value is not None]
    return "\n".join(kept) + "\n"


def copy_recipe(recipe: Recipe, folder: Path, values: Mapping[str, Any] | None = None) -> list[str]:
    """Copy a recipe's settings, script, launch file and page into a folder; return the words that start it there.

    Args:
        recipe: to copy.
        folder: new, or without files of these names.
        values: changes of the settings.

    Raises:
        ConfigError: a file is there already, or cannot be written.
    """
    launch = [recipe.launch] if recipe.launch else []
    targets = {file: folder / file.name for file in (*recipe.scripts, *launch)}
    settings, page = folder / SETTINGS, folder / "README.md"
    for target in (settings, page, *targets.values()):
        if target.exists():
            raise ConfigError(f"{target} is there already. Name another folder, or move it away.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settings.write_text(_at_home(changed(recipe.settings.read_text("utf-8"), values or {}), recipe), "utf-8")
        if recipe.readme.is_file():
            page.write_text(_at_home(recipe.readme.read_text("utf-8"), recipe), "utf-8")
        for file, target in targets.items():
            shutil.copyfile(file, target)
    except OSError as error:
        raise ConfigError(f"Cannot write into {str(folder)!r}: {error.strerror or error}.") from error
    start = ["accelerate", "launch", "--config_file", str(targets[launch[0]])] if launch else ["python"]
    return [*start, str(targets[recipe.script]), "--config", str(settings)]


def _at_home(text: str, recipe: Recipe) -> str:
    """Name the copies instead of the files of the repository, and the package instead of a checkout."""
    text = text.replace("From the root of the repository", "In this folder")
    text = re.sub(r" \(`make \w+` does the same in a fresh environment\)", "", text)
    text = re.sub(r'pip install -e "\.(\[[\w,]+\])"', r'pip install "hf-hetero\1"', text)
    text = re.sub(r"\s+\(\[\w+\]\(\.\.[^)\s]*\)\)", "", text)  # "(how)": pages that a copy has not beside it
    text = re.sub(r"\[([^\]]+)\]\(\.\.[^)\s]*\)", r"\1", text)
    for path in (f"recipes/{recipe.name}/", "recipes/accelerate/", "recipes/"):
        text = text.replace(path, "")
    return text


def _line(key: str, value: Any, comment: str = "") -> str:
    """Write a key, its value in one line, and what was said of it."""
    # a plain value of its own ends with a mark that ends a document
    written = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
    line = f"{key}: {written}"
    return f"{line.ljust(INDENT - 1)} {comment}" if comment else line
