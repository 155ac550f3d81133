"""What one degree for a whole run would have cost is said by a cost model that has a name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_hetero import CostModel
from hf_hetero.report.static_runs import model_words


@pytest.mark.parametrize(
    ("name", "provenance", "words"),
    [
        ("estimate", "refitted", "estimate, refitted"),
        ("estimate", "measured", "estimate, measured"),
        ("estimate", "estimated", "estimated"),
        ("", "measured", "unnamed, measured"),
        ("mine", None, "mine"),
    ],
)
def test_a_cost_model_is_named_once(name: str, provenance: str | None, words: str) -> None:
    """Where its seconds come from is said, and its name only if that says something else."""
    assert model_words(replace(CostModel.load("llama-8b_8xh100_nvlink"), name=name, provenance=provenance)) == words
