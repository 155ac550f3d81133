"""Settings: defaults that work, values checked when made, read by HfArgumentParser."""

from __future__ import annotations

from typing import Any

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
    ],
)
def test_bad_values(changes: dict[str, Any], message: str) -> None:
    """A value out of range is named, with what is allowed."""
    with pytest.raises(ConfigError, match=message):
        HeteroConfig(**changes)
