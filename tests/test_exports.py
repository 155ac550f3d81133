"""The catalogue: what the package says it exports is what can be imported."""

from __future__ import annotations

import subprocess
import sys

import hf_hetero
import hf_hetero.callbacks
import hf_hetero.collators

PROMISED = {
    "CostModel",
    "Group",
    "HeteroCPOTrainer",
    "HeteroConfig",
    "HeteroDPOTrainer",
    "HeteroEmbeddingTrainer",
    "HeteroError",
    "HeteroKTOTrainer",
    "HeteroORPOTrainer",
    "HeteroRewardTrainer",
    "HeteroSFTTrainer",
    "HeteroTrainer",
    "HeteroTrainerMixin",
    "InfeasibleBatch",
    "MicroBatch",
    "Plan",
    "Planner",
    "Topology",
    "UnsupportedModel",
}


def test_all_is_importable_and_sorted() -> None:
    """`__all__` is the promised list, in order, and every name is there."""
    assert hf_hetero.__all__ == sorted(PROMISED)
    assert all(getattr(hf_hetero, name).__name__ == name for name in PROMISED)
    assert set(hf_hetero.__all__) <= set(dir(hf_hetero))


def test_shelves() -> None:
    """Collators and callbacks are reached through the package."""
    assert {"PackedCollator"} <= set(hf_hetero.collators.__all__)
    assert {"PlanMetricsCallback", "CalibrationCallback"} <= set(hf_hetero.callbacks.__all__)


def test_unknown_name() -> None:
    """A name that is not exported is an AttributeError, as everywhere."""
    assert not hasattr(hf_hetero, "Nonsense")


def test_planning_needs_no_torch() -> None:
    """Importing the planner leaves torch and transformers alone, so the command line starts at once."""
    code = "import sys; from hf_hetero import Planner, CostModel; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
