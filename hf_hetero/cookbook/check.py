"""This checks a recipe before it is paid for: its keys, its launch file, a plan of its data, three steps on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from hf_hetero.config import HeteroConfig
from hf_hetero.cookbook.keys import ON_A_CPU, Problem, key_in, key_problems, launch_problems, script_of, settings_of
from hf_hetero.cookbook.sample import Planned, Sample, can_be_looked_at, planned, sample_of
from hf_hetero.cookbook.shelf import Recipe, mesh_in, read
from hf_hetero.cookbook.trial import Trial, tried
from hf_hetero.errors import HeteroError, InfeasibleBatch

LIMITS = ("max_tokens_per_rank", "max_degree", "max_length")
"""Keys that decide whether a sample fits, the most likely first."""


@dataclass
class Checked:
    """`Checked` is what a check found.

    Args:
        name: of the recipe.
        num_keys: of its settings.
        problems: in the order in which they were found; none: it is right as far as this looks.
        launch: what starts its ranks, in words.
        sample: rows of its data; None: they were not looked at.
        planned: a step of them.
        trial: three steps.
    """

    name: str
    num_keys: int
    problems: list[Problem] = field(default_factory=list[Problem])
    launch: str = ""
    sample: Sample | None = None
    planned: Planned | None = None
    trial: Trial | None = None

    @property
    def ok(self) -> bool:
        """Return whether nothing wrong was found."""
        return not self.problems


def check_recipe(
    recipe: Recipe, changes: Mapping[str, Any] | None = None, gpus: str | None = None, trains: bool = True
) -> Checked:
    """Check a recipe; what is wrong early is found without what comes later.

    Args:
        recipe: to check.
        changes: of its settings, such as a local folder for `model`.
        gpus: to plan for, such as "8xH100"; None: so many H100, or this CPU.
        trains: three steps, too.

    Raises:
        HeteroError: the file cannot be read, or its script cannot be loaded.
    """
    values = {key: value for key, value in {**read(recipe.settings), **(changes or {})}.items() if value is not None}
    script, checked = script_of(recipe), Checked(recipe.name, len(values))
    checked.problems = key_problems(script, values) + launch_problems(recipe, values)
    if recipe.launch is not None:
        checked.launch = f"{recipe.launch.name} starts {read(recipe.launch).get('num_processes')} ranks"
    if not checked.ok:
        return checked
    parsed = settings_of(script, {**values, **ON_A_CPU})
    known = {item.name: getattr(settings, item.name) for settings in parsed for item in fields(settings)}
    with _noted(checked, values):
        checked.sample = sample_of(script, parsed[0]) if can_be_looked_at(script) else None
    if checked.ok and checked.sample is not None:
        _plan(checked, values, parsed, gpus, recipe)
    if checked.ok and trains:
        with _noted(checked, values):
            checked.trial = tried(recipe, values, frozenset(known), checked.sample)
    return checked


def _plan(
    checked: Checked, values: Mapping[str, Any], parsed: tuple[Any, ...], gpus: str | None, recipe: Recipe
) -> None:
    """Plan a step of the sample."""
    assert checked.sample is not None
    hetero = next(settings for settings in parsed if isinstance(settings, HeteroConfig))
    sharded = recipe.launch is not None and read(recipe.launch).get("distributed_type") == "FSDP"
    mesh = mesh_in(recipe.launch) if recipe.launch is not None and sharded else None
    shards = None if mesh is None else mesh[1]
    with _noted(checked, values):
        checked.planned = planned(values, checked.sample.lengths, hetero, gpus, sharded, shards)


@contextmanager
def _noted(checked: Checked, values: Mapping[str, Any]) -> Iterator[None]:
    """Note what is raised within as a problem of the key that it is about."""
    try:
        yield
    except HeteroError as error:
        said = " ".join(str(error).split())
        limits = [key for key in LIMITS if values.get(key) is not None]
        # a sample that fits nowhere is named by its number: what decides it are the limits
        key = limits[0] if limits and isinstance(error, InfeasibleBatch) else key_in(said, values)
        checked.problems.append(Problem(key, said))
