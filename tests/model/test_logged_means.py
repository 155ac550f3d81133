"""Means over tokens of values kept a micro-batch; and what a trial leaves of them."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest

from hf_hetero.model.logged_means import LoggedMeans, uncounted


def keeping(**values: list[float]) -> Any:
    """A trainer that has kept these values in training."""
    kept = defaultdict(list, values)
    return SimpleNamespace(_metrics={"train": kept, "eval": defaultdict(list)}, _total_train_tokens=5)


def test_each_token_counts_alike() -> None:
    """The mean of two values of one and three tokens; of a micro-batch without targets nothing counts."""
    trainer = keeping(accuracy=[1.0, 0.5, 0.0], num_tokens=[7.0])
    means = LoggedMeans(trainer)
    means.add("train", [1, 3])
    means.add("train", [0])
    means.weigh("train")
    assert trainer._metrics["train"] == {"accuracy": [pytest.approx(2.5 / 4)], "num_tokens": [7.0]}


def test_each_window_has_weights_of_its_own() -> None:
    """Weights are forgotten with the values they belong to, those of evaluation apart from those of training."""
    trainer = keeping(accuracy=[1.0, 0.0])
    means = LoggedMeans(trainer)
    means.add("train", [3, 1])
    means.add("eval", [1])
    means.weigh("train")
    trainer._metrics["train"]["accuracy"] = [0.0, 1.0]
    means.add("train", [3, 1])
    means.weigh("train")
    assert trainer._metrics["train"]["accuracy"] == [0.25]


@pytest.mark.parametrize("counts", [[], [2], [0, 0]], ids=["none", "too few", "no target"])
def test_other_values_stay(counts: list[int]) -> None:
    """Values that no planned step has counted tokens for, or that count none, are left to the trainer."""
    trainer = keeping(accuracy=[1.0, 0.0])
    means = LoggedMeans(trainer)
    means.add("train", counts)
    means.weigh("train")
    assert trainer._metrics["train"]["accuracy"] == [1.0, 0.0]


def test_trainers_that_keep_no_values() -> None:
    """Transformers' own, for one."""
    means = LoggedMeans(SimpleNamespace())
    means.add("train", [1])
    means.weigh("train")
    assert not means


def test_a_trial_leaves_no_trace() -> None:
    """What a loss counts meanwhile is taken back."""
    trainer = keeping(accuracy=[1.0])
    with uncounted(trainer):
        trainer._metrics["train"]["accuracy"].append(0.0)
        trainer._total_train_tokens += 3
    assert trainer._metrics["train"] == {"accuracy": [1.0]}
    assert trainer._total_train_tokens == 5
