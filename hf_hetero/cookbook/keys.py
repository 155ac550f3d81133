"""This module tries each key of a recipe's settings by itself, so that whatever is wrong is said with its key."""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

import yaml
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_hetero.cookbook.shelf import MESH, Recipe, mesh_in, read
from hf_hetero.errors import HeteroError
from hf_hetero.fine_tuning import explaining

ON_A_CPU: Mapping[str, Any] = {"use_cpu": True}
"""What lets a machine without a GPU read settings that want one."""
AT_LEAST_ONE = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""Counts that `TrainingArguments` takes whatever they are."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A `Problem` is what is wrong with a key of a recipe, and what to do.

    Args:
        key: of the settings; empty: it is about none in particular.
        said: reason and remedy.
    """

    key: str
    said: str


def script_of(recipe: Recipe) -> ModuleType:
    """Load a recipe's script, without running it.

    Raises:
        HeteroError: it cannot be loaded, or is no script of recipes.
    """
    name = f"_recipe_script_{recipe.script.stem}"
    spec = importlib.util.spec_from_file_location(name, recipe.script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their types up there
    sys.path.insert(0, folder := str(recipe.script.parent))  # a script may import those beside it
    try:
        with explaining(f"Cannot load {recipe.script}"):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    if not hasattr(module, "parse") or not hasattr(module, "main"):
        raise HeteroError(f"{recipe.script} has no `parse` and `main`: it is no script of recipes.")
    return module


def settings_of(script: ModuleType, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Let a script read settings, as from a file.

    Raises:
        HeteroError: as the script says it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.yaml"
        path.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
        return script.parse(["--config", str(path)])


def key_problems(script: ModuleType, values: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with settings: each key that cannot be by itself, else what they cannot be together."""
    problems: list[Problem] = []
    try:
        settings_of(script, {**values, **ON_A_CPU})
    except HeteroError as error:
        least = _least(script)
        known = _known(script)
        problems = [
            Problem(key, said)
            for key, value in values.items()
            for said in _wrong_alone(script, {**least, key: value}, known.get(key))
        ]
        problems = problems or [Problem(key_in(str(error), values), str(error))]
    own = dict(_taken_as_they_are(script, values))  # in plainer words than a library's, where both know
    return [one for one in problems if one.key not in own] + [Problem(key, said) for key, said in own.items()]


def launch_problems(recipe: Recipe, values: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong between settings and launch file: sharding that is not to be had, or other ranks."""
    wanted = values.get("num_ranks")
    if problems := list(_unsharded(recipe, values)):
        return problems
    if wanted is None or (recipe.launch is None and wanted == 1):
        return []
    if recipe.launch is None:
        return [
            Problem("num_ranks", f"num_ranks={wanted}, but there is no launch file beside it, so one rank would start.")
        ]
    starts, mesh = read(recipe.launch).get("num_processes"), mesh_in(recipe.launch)
    if starts == wanted and (mesh is None or mesh[0] * mesh[1] == wanted):
        return []
    if starts == wanted and mesh is not None:
        said = f"{MESH} of {recipe.launch.name} has {mesh[0]} x {mesh[1]} ranks, and {starts} start."
        return [Problem("num_ranks", f"{said} Choose sizes whose product is {starts}.")]
    return [
        Problem(
            "num_ranks",
            f"num_ranks={wanted}, but {recipe.launch.name} starts num_processes={starts} ranks. Make them equal: "
            f"set num_ranks to {starts}, or num_processes to {wanted} in a copy of {recipe.launch.name}.",
        )
    ]


def _unsharded(recipe: Recipe, values: Mapping[str, Any]) -> Iterator[Problem]:
    """Say that weights are to be sharded where accelerate, without a word, does not: training refuses that."""
    launch = {} if recipe.launch is None else read(recipe.launch)
    if values.get("fsdp"):
        key, asked = "fsdp", f"fsdp={values['fsdp']!r:.60}"
    elif launch.get("distributed_type") == "FSDP" and recipe.launch is not None:
        key, asked = "use_cpu" if values.get("use_cpu") else "", f"distributed_type: FSDP of {recipe.launch.name}"
    else:
        return
    if values.get("use_cpu") or launch.get("use_cpu"):
        yield Problem(key, f"{asked}: weights are sharded over GPUs, not over CPUs (use_cpu). Leave one of them out.")
    elif launch.get("num_processes", 1) == 1:
        yield Problem(key, f"{asked}: weights are sharded over several ranks, and one starts. Start more.")


def _taken_as_they_are(script: ModuleType, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Say what is wrong with values that `TrainingArguments` takes, and a trial, which has others, cannot find."""
    for key in AT_LEAST_ONE:
        if isinstance(values.get(key), int) and values[key] < 1:
            yield key, f"{key}={values[key]}: it must be at least 1."
    known = _known(script)
    for key, value in values.items():
        if isinstance(value, dict | list) and key in known and isinstance(known[key].default, int | float):
            yield key, f"{key}={value!r:.60}: it must be one value. Its default is {known[key].default!r}."
    degree, num_ranks = values.get("max_degree"), values.get("num_ranks")
    if _is_count(degree) and degree & (degree - 1) and degree != num_ranks:
        near = 1 << degree.bit_length() - 1
        yield (
            "max_degree",
            f"max_degree={degree}: 1, 2, 4, ... ranks share a sample, or all of them do, so this acts as {near}. "
            f"Set {near}, or {2 * near}.",
        )
    rate = values.get("learning_rate")
    if isinstance(rate, int | float) and rate < 0:
        yield "learning_rate", f"learning_rate={rate:g}: it must be at least 0, such as 1.0e-5."
    trackers = values.get("report_to")
    for name in trackers if isinstance(trackers, list) else [trackers]:  # pyright: ignore[reportUnknownVariableType]
        if isinstance(name, str) and name not in (*INTEGRATION_TO_CALLBACK, "all", "none"):
            near = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Choose from {', '.join(INTEGRATION_TO_CALLBACK)}, none."
            yield "report_to", f"report_to={name!r:.60}: no such tracker. {hint}"


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _least(script: ModuleType) -> dict[str, Any]:
    """Return the least settings that a script reads: some insist on a model and a dataset.

    Raises:
        HeteroError: it insists on more.
    """
    named = {**ON_A_CPU, "model": "a-model", "dataset": "a-dataset"}
    with _quietly():
        for least in (dict(ON_A_CPU), named):
            with suppress(HeteroError):
                settings_of(script, least)
                return least
        settings_of(script, named)
    return named


def _known(script: ModuleType) -> dict[str, Field[Any]]:
    """Return the fields of all settings that a script reads, by key."""
    with _quietly():
        return {item.name: item for kind in settings_of(script, _least(script)) for item in fields(kind)}


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep quiet what libraries warn of within: settings that nobody has written are nobody's to change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _wrong_alone(script: ModuleType, values: Mapping[str, Any], item: Field[Any] | None) -> Iterator[str]:
    """Say what is wrong with a key, if anything, and what it is for; the other values are right."""
    try:
        settings_of(script, values)
    except HeteroError as error:
        yield _without_help(str(error)) + _described(item)


def _described(item: Field[Any] | None) -> str:
    """Say a field's default, and what it is for."""
    if item is None:
        return ""
    default = f" Its default is {item.default!r}." if item.default is not MISSING else ""
    # long ones go on about rare cases
    about = str(item.metadata.get("help", "")).split(". ")[0].strip().rstrip(".")
    return f"{default} {about}." if about else default


def _without_help(said: str) -> str:
    """Leave out where the error was found, which is a copy, and where all keys are listed, which is in its place."""
    said = re.sub(r"^\S*settings\.yaml: ", "", said)
    return re.sub(r" `python \S+ --help` (says what can be|lists them all)\.$", "", said)


def key_in(said: str, values: Mapping[str, Any]) -> str:
    """Return the key of settings that a message is about: the first it names, else one whose value it has; else ""."""
    for marked in ("{}=", "`{}`", "'{}'"):
        if (named := _first(marked, said, values)) is not None:
            return named
    for key, value in values.items():
        items: list[Any] = value if isinstance(value, list) else [value]
        if any(isinstance(item, str) and (repr(item) in said or f'"{item}"' in said) for item in items):
            return key
    words = re.findall(r"\w+", said)
    return _first("{}:", said, values) or next((key for key in values if "_" in key and key in words), "")


def _first(marked: str, said: str, keys: Iterable[str]) -> str | None:
    """Return the key that stands first in a message, with marks around it."""
    found = {key: re.search(rf"(?<!\w){re.escape(marked.format(key))}", said) for key in keys}
    return min((at.start(), key) for key, at in found.items() if at)[1] if any(found.values()) else None
