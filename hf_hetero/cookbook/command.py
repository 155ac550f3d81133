"""This is the verb `hf-hetero recipes`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from hf_hetero.cookbook.changes import changed, copy_recipe, values_said
from hf_hetero.cookbook.shelf import recipe_at, recipe_named, shelf
from hf_hetero.terminal.blocks import Table, words
from hf_hetero.terminal.show import show


def add_recipes(verbs: Any) -> None:
    """Add the verb to those of the command line."""
    verb: argparse.ArgumentParser = verbs.add_parser("recipes", help="settings to start from: list, show, copy, check")
    what = verb.add_subparsers(required=True, metavar="WHAT")

    what.add_parser("list", help="those that come with the package").set_defaults(run=_list)

    shown = what.add_parser("show", help="a recipe's page, and its settings")
    shown.add_argument("name", help="one that `list` has")
    shown.set_defaults(run=_show)

    copied = what.add_parser("copy", help="a recipe's settings, script and launch file into a folder of your own")
    copied.add_argument("name", help="one that `list` has")
    copied.add_argument("-o", "--output", metavar="DIR", required=True, help="a new folder")
    _add_changes(copied)
    copied.set_defaults(run=_copy)

    checked = what.add_parser(
        "check",
        help="are all keys right, does a sample of the data fit, do three steps train? Before a GPU is paid for",
    )
    checked.add_argument("file", help="a train.yaml, its folder, or a name that `list` has")
    _add_changes(checked)
    checked.add_argument("--gpus", help="to plan for, such as 8xH100; default: as many H100 as it has ranks")
    checked.add_argument("--no-training", action="store_true", help="leave the three steps out")
    checked.set_defaults(run=_check)


def _add_changes(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="instead of what the settings say, such as model=/models/mine; may be given several times",
    )


def _list(args: argparse.Namespace) -> None:
    """Print a line a recipe: its name, and the comment that its settings open with."""
    show(Table((words(), words(gap=2)), tuple((recipe.name, recipe.about) for recipe in shelf())))


def _show(args: argparse.Namespace) -> None:
    """Print a recipe's page and settings."""
    recipe = recipe_named(args.name)
    print(recipe.readme.read_text(encoding="utf-8"))
    print(changed(recipe.settings.read_text(encoding="utf-8"), {}), end="")


def _copy(args: argparse.Namespace) -> None:
    """Copy a recipe, and print what starts it."""
    command = copy_recipe(recipe_named(args.name), Path(args.output), values_said(args.changes))
    print(f"Wrote {args.output}. Check it, then start it:")
    print(f"  hf-hetero recipes check {shlex.quote(args.output)}")
    print(f"  {shlex.join(command)}")


def _check(args: argparse.Namespace) -> int:
    """Check a recipe, and print what was found; 1 if something is wrong."""
    recipe, changes = recipe_at(args.file), values_said(args.changes)
    from hf_hetero.cookbook.check import check_recipe  # torch and transformers, which a list does without
    from hf_hetero.cookbook.report import check_facts

    checked = check_recipe(recipe, changes, args.gpus, trains=not args.no_training)
    show(*check_facts(checked))
    return 0 if checked.ok else 1
