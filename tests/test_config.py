"""Settings: defaults that work, values checked when made, read by HfArgumentParser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_hetero import HeteroConfig
from hf_hetero.errors import ConfigError


def test_parses_beside_training_arguments() -> None:
    """HfArgumentParser reads both from one command line."""
    parser = HfArgumentParser((TrainingArguments, HeteroConfig))  # pyright: ignore
    line = ["--output_dir", "out", "--use_cpu", "--max_degree", "4", "--methods", "ulysses", "--plan_ahead_steps", "2"]
    args, hetero = parser.parse_args_into_dataclasses(line)
    assert (args.output_dir, hetero.max_degree, hetero.methods, hetero.plan_ahead_steps) == ("out", 4, ["ulysses"], 2)
    assert hetero.cost_model is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_degree": 0}, "max_degree=0: it must be at least 1"),
        ({"solver": "guess"}, "choose one of auto, fast, mip"),
        ({"methods": ["telepathy"]}, "telepathy"),
        ({"methods": []}, "choose from"),
        ({"group_timeout_s": 0.0}, "above 0 seconds"),
        ({"planning_timeout_s": -1.0}, "planning_timeout_s=-1.0: it must be above 0 seconds"),
        ({"max_tokens_per_rank": -5}, "max_tokens_per_rank=-5"),
        ({"max_tokens_per_rank": 1 << 41}, "max_tokens_per_rank=2199023255552: it must be at most 1,099,511,627,776"),
        ({"max_sample_tokens": 10**400}, "max_sample_tokens=1000"),
        ({"plan_ahead_steps": 10**9}, "plan_ahead_steps=1000000000: it must be at most 1,000"),
        ({"group_timeout_s": float("nan")}, "group_timeout_s=nan: it must be above 0 seconds"),
        ({"planning_timeout_s": float("inf")}, "planning_timeout_s=inf: it must be above 0 seconds, and at most"),
    ],
)
def test_bad_values(changes: dict[str, Any], message: str) -> None:
    """A value out of range is named, with what is allowed."""
    with pytest.raises(ConfigError, match=message):
        HeteroConfig(**changes)


WRONG_KINDS: dict[str, tuple[list[Any], str]] = {
    "cost_model": ([5, True, ["a"]], "text"),
    "solver": ([None, 3], "text"),
    "length_column": ([None, 3], "text"),
    "max_degree": (["2", 2.0, True, float("nan")], "a whole number"),
    "max_tokens_per_rank": (["10", 1e6], "a whole number"),
    "max_sample_tokens": ([2.5, "2"], "a whole number"),
    "num_ranks": (["2", False], "a whole number"),
    "plan_ahead_steps": ([1.5, None, "1"], "a whole number"),
    "group_timeout_s": (["5", None, True], "a number"),
    "planning_timeout_s": (["5", None, True], "a number"),
    "chunked_loss": (["no", 0, None], "True or False"),
    "plan_evaluation": (["yes", 1], "True or False"),
    "sync_each_micro_batch": (["no", 0], "True or False"),
    "methods": ([None, "ulysses", 3, [1], {"ulysses"}], "a list of names"),
    "activation_policies": ([None, "offload", [None]], "a list of names"),
}


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_values_of_another_kind(name: str) -> None:
    """Nothing is converted or taken for what it is not: the field, the value, and what it must be are named."""
    values, words = WRONG_KINDS[name]
    for value in values:
        with pytest.raises(ConfigError, match=rf"^HeteroConfig\.{name}={re.escape(repr(value))}: it must be {words}"):
            HeteroConfig(**{name: value})


def test_values_of_like_kinds() -> None:
    """A path is a path, a number of numpy a number, and a tuple of names a list of names."""
    config = HeteroConfig(
        cost_model=Path("cost.json"),  # pyright: ignore
        max_degree=np.int64(4),  # pyright: ignore
        group_timeout_s=5,
        methods=("ring",),  # pyright: ignore
    )
    assert (config.cost_model, config.max_degree, config.group_timeout_s) == ("cost.json", 4, 5)


def test_the_readme_lists_every_setting() -> None:
    """The table of README.md has each field once, less the choice of who solves integer programs, and its default."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", readme[readme.index("| field | default | |") :], re.MULTILINE))
    defaults = vars(HeteroConfig())
    assert set(listed) == set(defaults) - {"mip_backend"}
    for name, said in listed.items():
        default = defaults[name]
        if isinstance(default, bool):
            assert said == ("yes" if default else "no"), name
        elif isinstance(default, int | float):
            assert float(said) == default, name
        elif isinstance(default, str):
            assert said == f"`{default}`", name
