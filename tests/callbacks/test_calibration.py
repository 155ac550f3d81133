"""Calibration finds the times that made the measurements."""

from __future__ import annotations

import random
from typing import Any

import pytest
from costs.test_cost_model import a_cost_model

from hf_hetero import CostModel, Group, MicroBatch, Plan
from hf_hetero.callbacks import CalibrationCallback
from hf_hetero.callbacks.calibration import scaled
from hf_hetero.plan import StepReport

SHAPES = [[(0, 1, 2, 3)], [(0, 1), (2, 3)], [(0, 1), (2,), (3,)], [(0,), (1,), (2,), (3,)]]


def measured_by(truth: CostModel, rng: random.Random, is_lockstep: bool = False) -> StepReport:
    """A step of random groups whose times are those of another cost model."""
    shape = rng.choice(SHAPES)
    lengths = tuple(rng.randrange(1, 4000) for _ in range(3 * len(shape)))
    groups = tuple(Group(ranks, tuple(range(3 * i, 3 * i + 3))) for i, ranks in enumerate(shape))
    busy = [0.0] * 4
    for group in groups:
        for rank in group.ranks:
            busy[rank] = truth.group_seconds(group, lengths)
    if is_lockstep:
        busy = [max(busy)] * 4
    plan = Plan(4, (MicroBatch(groups),))
    return StepReport(1, plan, lengths, 1, sum(busy), (tuple(busy),), is_lockstep=is_lockstep)


def calibrated(cost: CostModel, truth: CostModel, num_steps: int = 60, is_lockstep: bool = False) -> CostModel | None:
    callback, rng = CalibrationCallback(skip_steps=3, every_steps=num_steps, pull=0.1), random.Random(0)
    for _ in range(num_steps + 3):
        assert callback.recalibrated(cost) is None
        callback.on_step_report(None, None, measured_by(truth, rng, is_lockstep))  # pyright: ignore
    return callback.recalibrated(cost)


@pytest.mark.parametrize("factors", [(1, 1, 1, 1), (3, 3, 3, 3), (2, 0.5, 4, 1.5)])
def test_recovers_the_truth(factors: tuple[float, ...]) -> None:
    """From steps timed by another machine, predictions for that machine come within a few percent."""
    cost = a_cost_model(all_to_all_latency_s={2: 0.2, 4: 0.25})
    truth = scaled(cost, factors)  # pyright: ignore
    found = calibrated(cost, truth)
    assert found is not None
    for degree in (1, 2, 4):
        for lengths in ([100] * 20, [3000], [800, 50, 2000]):
            assert found.seconds(lengths, degree) == pytest.approx(truth.seconds(lengths, degree), rel=0.08)


def test_ranks_in_step_tell_of_the_slowest_group() -> None:
    """Where sharded weights make all ranks wait for the slowest group, only that group is learnt from."""
    cost = a_cost_model(all_to_all_latency_s={2: 0.2, 4: 0.25})
    truth = scaled(cost, (3, 3, 3, 3))  # pyright: ignore
    found = calibrated(cost, truth, is_lockstep=True)
    assert found is not None
    for degree in (1, 2, 4):
        assert found.seconds([800, 50, 2000], degree) == pytest.approx(truth.seconds([800, 50, 2000], degree), rel=0.08)


def test_memory_is_left_alone() -> None:
    """What a rank can hold is not a matter of time."""
    cost = a_cost_model()
    found: Any = calibrated(cost, scaled(cost, (2, 2, 2, 2)))  # pyright: ignore
    assert found.capacity_tokens == cost.capacity_tokens
    assert found.degrees(8) == cost.degrees(8)


def test_waits_for_enough_steps() -> None:
    """Nothing is refitted before the first steps are over and enough were seen."""
    callback = CalibrationCallback(skip_steps=2, every_steps=2)
    cost, rng = a_cost_model(), random.Random(1)
    for expected in (None, None, None, "fit", None):
        callback.on_step_report(None, None, measured_by(cost, rng))  # pyright: ignore
        assert (callback.recalibrated(cost) is not None) == (expected is not None)
