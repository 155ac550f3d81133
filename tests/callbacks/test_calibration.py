"""Calibration finds the times that made the measurements."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from costs.test_cost_model import a_cost_model
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_hetero import CostModel, Group, MicroBatch, Plan
from hf_hetero.callbacks import CalibrationCallback
from hf_hetero.callbacks.refitting import observations, scaled
from hf_hetero.callbacks.slowness import timed_groups
from hf_hetero.plan import StepReport

ARGS = TrainingArguments(use_cpu=True)
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
    callback = CalibrationCallback(skip_steps=3, every_steps=num_steps, pull=0.1, first_steps=num_steps)
    rng = random.Random(0)
    for _ in range(num_steps + 3):
        assert callback.recalibrated(cost) is None
        callback.on_step_report(ARGS, TrainerState(), measured_by(truth, rng, is_lockstep))
    return callback.recalibrated(cost)


@pytest.mark.parametrize("factors", [(3, 3, 3, 3), (0.3, 0.3, 0.3, 0.3), (2, 0.5, 4, 1.5)])
def test_recovers_the_truth(factors: tuple[float, ...]) -> None:
    """From steps timed by another machine, predictions for that machine come within a few percent."""
    cost = a_cost_model(all_to_all_latency_s={2: 0.2, 4: 0.25})
    truth = scaled(cost, np.array(factors))
    found = calibrated(cost, truth)
    assert found is not None
    for degree in (1, 2, 4):
        for lengths in ([100] * 20, [3000], [800, 50, 2000]):
            assert found.seconds(lengths, degree) == pytest.approx(truth.seconds(lengths, degree), rel=0.08)


def test_ranks_in_step_tell_of_the_slowest_group() -> None:
    """Where sharded weights make all ranks wait for the slowest group, only that group is learnt from."""
    cost = a_cost_model(all_to_all_latency_s={2: 0.2, 4: 0.25})
    truth = scaled(cost, np.full(4, 3.0))
    found = calibrated(cost, truth, is_lockstep=True)
    assert found is not None
    for degree in (1, 2, 4):
        assert found.seconds([800, 50, 2000], degree) == pytest.approx(truth.seconds([800, 50, 2000], degree), rel=0.08)


@pytest.mark.parametrize("is_lockstep", [False, True])
def test_groups_of_other_costs_teach_nothing(is_lockstep: bool) -> None:
    """A group with activations, at a degree or by a method that the cost model does not know is passed over."""
    cost = a_cost_model()
    report = measured_by(cost, random.Random(0), is_lockstep)
    known = len(observations(cost, [report]).measured)
    strange = Plan(4, (MicroBatch((Group((0, 1, 2, 3), (0, 1, 2), activations="offload"),)),))
    wide = Plan(8, (MicroBatch((Group(tuple(range(8)), (0, 1, 2)),)),))
    blocks = Plan(4, (MicroBatch((Group((0, 1, 2, 3), (0, 1, 2), "ulysses_ring", 2),)),))
    others = [replace(report, plan=plan, busy_s=((1.0,) * plan.num_ranks,)) for plan in (strange, wide, blocks)]
    assert len(observations(cost, [report, *others]).measured) == known > 0


@pytest.mark.parametrize("is_lockstep", [False, True])
def test_the_newest_groups_are_enough(is_lockstep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many groups the newest are taken, in their order, and no others are priced."""
    cost, rng, priced = a_cost_model(), random.Random(0), list[Group]()
    reports = [measured_by(cost, rng, is_lockstep) for _ in range(20)]
    every = observations(cost, reports)
    charge = CostModel.charges

    def charged(self: CostModel, group: Group, lengths: Any) -> Any:
        priced.append(group)
        return charge(self, group, lengths)

    monkeypatch.setattr(CostModel, "charges", charged)
    for most in (1, 7, len(every.measured), 1000):
        priced.clear()
        some = observations(cost, reports, most)
        assert len(priced) == len(some.measured) == min(most, len(every.measured))
        np.testing.assert_array_equal(some.charged, every.charged[-most:])
        np.testing.assert_array_equal(some.measured, every.measured[-most:])


def test_passes_without_gradients_teach_nothing() -> None:
    """What micro-batches take that have no backward pass is not what the cost model predicts."""
    cost = a_cost_model()
    report = measured_by(cost, random.Random(0), False)
    known, num_micro_batches = len(observations(cost, [report]).measured), len(report.plan.micro_batches)
    left = [len(observations(cost, [replace(report, forward_only=(n,))]).measured) for n in range(num_micro_batches)]
    filled = [sum(bool(group.samples) for group in m.groups) for m in report.plan.micro_batches]
    assert left == [known - count for count in filled]
    assert not len(observations(cost, [replace(report, forward_only=tuple(range(num_micro_batches)))]).measured)


def test_memory_is_left_alone() -> None:
    """What a rank can hold is not a matter of time."""
    cost = a_cost_model()
    found: Any = calibrated(cost, scaled(cost, np.full(4, 2.0)))
    assert found.capacity_tokens == cost.capacity_tokens
    assert found.degrees(8) == cost.degrees(8)


def test_waits_for_enough_steps() -> None:
    """Nothing is refitted before the first steps are over and enough were seen; the first refit comes sooner."""
    callback = CalibrationCallback(skip_steps=2, every_steps=3, first_steps=1)
    cost, rng, slower = a_cost_model(), random.Random(1), 1.0
    for expected in (None, None, "fit", None, None, "fit", None, None, "fit"):
        slower *= 2 if expected else 1  # else a refit would find nothing to change
        truth = scaled(a_cost_model(), np.full(4, slower))
        callback.on_step_report(ARGS, TrainerState(), measured_by(truth, rng))
        found = callback.recalibrated(cost)
        assert (found is not None) == (expected is not None)
        cost = found or cost


def test_what_is_right_stays() -> None:
    """A cost model that predicts well is not changed, however many steps are reported."""
    callback, cost, rng = CalibrationCallback(skip_steps=0, every_steps=2), a_cost_model(), random.Random(2)
    for _ in range(12):
        callback.on_step_report(ARGS, TrainerState(), measured_by(cost, rng))
        assert callback.recalibrated(cost) is None


def test_a_disturbed_step_moves_little() -> None:
    """With one step in ten ten times as long, the truth is found as without."""
    cost = a_cost_model(all_to_all_latency_s={2: 0.2, 4: 0.25})
    truth = scaled(cost, np.array([3.0, 2.0, 4.0, 2.0]))
    callback, rng = CalibrationCallback(skip_steps=0, every_steps=60, pull=0.1, first_steps=60), random.Random(0)
    for number in range(60):
        report = measured_by(truth, rng)
        if not number % 10:
            report = replace(report, busy_s=tuple(tuple(10 * s for s in ranks) for ranks in report.busy_s))
        callback.on_step_report(ARGS, TrainerState(), report)
    found = callback.recalibrated(cost)
    assert found is not None
    for degree in (1, 2, 4):
        assert found.seconds([800, 50, 2000], degree) == pytest.approx(truth.seconds([800, 50, 2000], degree), rel=0.05)


@pytest.mark.parametrize("cut", [4, 7, 13])
def test_goes_on_where_it_was(cut: int) -> None:
    """Cut at any step and restored from JSON, it refits after the same steps to the same bits."""

    def refits(cut: int | None) -> list[dict[str, Any] | None]:
        callback, cost, rng = (
            CalibrationCallback(skip_steps=2, every_steps=4, first_steps=3),
            a_cost_model(),
            random.Random(3),
        )
        found: list[dict[str, Any] | None] = []
        for number in range(20):
            if number == cut:
                kept = json.loads(json.dumps(callback.state()))
                callback = CalibrationCallback(skip_steps=2, every_steps=4, first_steps=3)
                callback.restore(kept)
            truth = scaled(a_cost_model(), np.array([1.0 + number, 2.0, 3.0, 1.0]))
            callback.on_step_report(ARGS, TrainerState(), measured_by(truth, rng))
            refitted = callback.recalibrated(cost)
            cost = refitted or cost
            found.append(refitted and refitted.to_dict())
        return found

    assert sum(entry is not None for entry in refits(None)) > 2
    assert refits(cut) == refits(None)


def test_says_how_far_plans_were_off(caplog: pytest.LogCaptureFixture) -> None:
    """A line for each refit, and one when training ends; none on other ranks."""
    cost, rng = a_cost_model(), random.Random(4)
    truth = scaled(cost, np.full(4, 3.0))
    for is_first, lines in ((True, 2), (False, 0)):
        caplog.clear()
        state = TrainerState(is_world_process_zero=is_first)
        callback = CalibrationCallback(skip_steps=0, every_steps=2, first_steps=2)
        for _ in range(3):
            callback.on_step_report(ARGS, state, measured_by(truth, rng))
            callback.recalibrated(cost)
        callback.on_train_end(ARGS, state, TrainerControl())
        assert len(caplog.messages) == lines
        if is_first:
            assert "measured 3.00 x predicted, 67% apart" in caplog.messages[0]
            assert "refitted to within 0%: attention x 3.00" in caplog.messages[0]
            assert caplog.messages[1].startswith("In the last step plans were off by ")


def test_images_are_charged_as_they_were_planned() -> None:
    """What is compared with measured seconds is what the plan charged: towers, too, or their time is text's."""
    cost, lengths, as_text = a_cost_model(), (10, 20), (10, 90)
    plan = Plan(2, (MicroBatch((Group((0,), (0,)), Group((1,), (1,)))),))
    report = StepReport(1, plan, lengths, 5, 1.0, ((1.0, 1.0),))
    seeing = replace(report, as_text=as_text)
    for one, expected in ((report, lengths), (seeing, as_text)):
        charged = [list(cost.charges(group, expected)) for group in plan.groups]
        assert observations(cost, [one]).charged.tolist() == charged
        timed = timed_groups(cost, [one])[1, 1]
        assert timed[0].planned_s == pytest.approx(sum(charged[1]))
    assert observations(cost, [seeing]).charged.tolist() != observations(cost, [report]).charged.tolist()
