"""Plans are ready before their step, in order, and a failed solve costs a better plan but never a step."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from helpers import LENGTHS, ScriptedPlanner, ScriptedSource
from planner.reference import small_cost

from hf_hetero import InfeasibleBatch, Plan, Planner
from hf_hetero.data import plan_ahead
from hf_hetero.data.epochs import draws_of
from hf_hetero.data.plan_ahead import PlanAhead
from hf_hetero.data.plan_sources import planned_elsewhere
from hf_hetero.data.sampler import GlobalBatches
from hf_hetero.planner import PlannerProcess
from hf_hetero.samples.samples import whole_rows

COST = small_cost(100, (2, 4))
BATCHES = GlobalBatches(len(LENGTHS), 8, seed=3)


def make(plan: Any, num_ahead: int = 2, fallback: Any = None, improve: Any = None) -> PlanAhead:
    source = ScriptedSource(plan, fallback or ScriptedPlanner(4).plan, improve or (lambda plan, _: plan))
    return PlanAhead(source, draws_of(BATCHES, whole_rows(LENGTHS)), num_ahead)


def test_steps_come_in_order_with_their_rows() -> None:
    """Each step holds its own rows and their lengths, across epochs."""
    source = make(ScriptedPlanner(4).plan)
    for epoch in range(2):
        for index in range(len(BATCHES)):
            step = source.step(epoch, index)
            assert (step.epoch, step.index, step.rows) == (epoch, index, BATCHES.rows(epoch, index))
            assert step.lengths == tuple(LENGTHS[row] for row in step.rows)
            assert step.plan == ScriptedPlanner(4).plan(step.lengths)
    source.close()


def test_coming_plans_are_solved_ahead() -> None:
    """After a step is taken the next ones are solved without being asked for, into the next epoch."""
    solved: list[Sequence[int]] = []
    done = threading.Event()

    def plan(lengths: Sequence[int]) -> Plan:
        solved.append(tuple(lengths))
        if len(solved) == 3:
            done.set()
        return ScriptedPlanner(4).plan(lengths)

    source = make(plan)
    source.step(0, len(BATCHES) - 1)
    assert done.wait(timeout=60)
    expected = [(0, len(BATCHES) - 1), (1, 0), (1, 1)]
    assert solved == [tuple(LENGTHS[row] for row in BATCHES.rows(*key)) for key in expected]
    assert source.step(1, 0).wait_s == 0.0
    source.close()


def test_late_plan_says_how_long_the_step_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is asked for before its plan is ready waits, and the wait is reported."""
    waits, wait = threading.Event(), plan_ahead.wait

    def waiting(*args: Any) -> Any:
        waits.set()
        return wait(*args)

    def plan(lengths: Sequence[int]) -> Plan:
        assert waits.wait(timeout=60)
        return ScriptedPlanner(4).plan(lengths)

    monkeypatch.setattr(plan_ahead, "wait", waiting)
    source = make(plan)
    assert source.step(0, 0).wait_s > 0
    source.close()


def test_failed_solve_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    """A solver that breaks is replaced for that step, with a warning that names it."""

    def plan(lengths: Sequence[int]) -> Plan:
        raise ZeroDivisionError("solver trouble")

    source = make(plan)
    with caplog.at_level(logging.WARNING):
        assert source.step(0, 1).plan == ScriptedPlanner(4).plan([LENGTHS[row] for row in BATCHES.rows(0, 1)])
    assert "Planning step 1 of epoch 0 failed" in caplog.text
    assert "solver trouble" in caplog.text
    source.close()


def test_infeasible_batch_is_no_reason_to_fall_back() -> None:
    """A batch that cannot be planned is an error that names the step and its rows."""

    def plan(lengths: Sequence[int]) -> Plan:
        raise InfeasibleBatch("sample 0 has too many tokens.")

    source = make(plan)
    with pytest.raises(InfeasibleBatch, match=r"Step 2 of epoch 0, dataset rows \d+, .*: sample 0 has too many"):
        source.step(0, 2)
    source.close()


def test_plans_of_an_abandoned_epoch_are_forgotten() -> None:
    """An epoch that was cut short leaves nothing behind."""
    source = make(ScriptedPlanner(4).plan)
    source.step(0, 0)
    source.step(3, 0)
    assert min(source._coming) > (3, 0)
    source.close()


def improved_by(share: float) -> Any:
    def improve(plan: Plan, lengths: Sequence[int]) -> Plan:
        return replace(plan, seconds=plan.seconds * share, lower_bound_s=plan.seconds * 0.5, solver="mip")

    return improve


def until(condition: Any) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 60 s")


@pytest.mark.parametrize(("share", "solver"), [(0.9, "mip"), (0.999, "fast")])
def test_plans_are_improved_while_there_is_time(share: float, solver: str) -> None:
    """A plan that became clearly faster is used; one that did not stays, with the better bound."""
    source = make(ScriptedPlanner(4).plan, improve=improved_by(share))
    source.step(0, 0)
    until(lambda: len(source._improved) == 2)
    plan = source.step(0, 1).plan
    assert plan.solver == solver
    assert plan.seconds == (0.9 if solver == "mip" else 1.0)
    assert plan.lower_bound_s == (0.5 if solver == "mip" else 1.0)  # never lower than what was proven before
    source.close()


def test_a_step_does_not_wait_for_an_improvement() -> None:
    """While the improver is busy, steps get the plans there are; what comes too late is dropped."""
    busy, go_on = threading.Event(), threading.Event()

    def improve(plan: Plan, lengths: Sequence[int]) -> Plan:
        busy.set()
        assert go_on.wait(timeout=100)
        return replace(plan, seconds=0.1, solver="mip")

    source = make(ScriptedPlanner(4).plan, num_ahead=1, improve=improve)
    source.step(0, 0)
    until(lambda: all(future.done() for future in source._coming.values()))
    source._wake_improver()
    assert busy.wait(timeout=60)
    assert source.step(0, 1).plan == ScriptedPlanner(4).plan([LENGTHS[row] for row in BATCHES.rows(0, 1)])
    go_on.set()
    until(lambda: source._improved or not source._improving)
    assert (0, 1) not in source._improved
    source.close()


def test_a_broken_improver_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """An improvement that fails is said and skipped."""

    def improve(plan: Plan, lengths: Sequence[int]) -> Plan:
        raise ZeroDivisionError("solver trouble")

    source = make(ScriptedPlanner(4).plan, improve=improve)
    with caplog.at_level(logging.WARNING):
        source.step(0, 0)
        until(lambda: len(source._improved) == 2)
        assert source.step(0, 1).plan == ScriptedPlanner(4).plan([LENGTHS[row] for row in BATCHES.rows(0, 1)])
    assert "Improving the plan of step" in caplog.text
    source.close()


def test_plans_from_another_process() -> None:
    """They are the plans of this one, and an error keeps its kind; closing ends both processes."""
    planner = Planner(COST, 4)
    source = planned_elsewhere(lambda: planner, improves=True)
    here = planner.plan(LENGTHS)
    assert replace(source.plan(LENGTHS), planning_s=here.planning_s) == here
    with pytest.raises(InfeasibleBatch):
        source.plan([10**9])
    assert source.improve(here, LENGTHS).seconds <= here.seconds
    assert source.static(LENGTHS).seconds >= here.seconds
    source.close()
    with pytest.raises(RuntimeError, match="closed"):
        source.plan(LENGTHS)


def test_a_planner_is_a_source_as_it_is() -> None:
    """A `Planner` has the three verbs, and nothing that must be closed."""
    planner = Planner(COST, 4, solver="fast")
    ahead = PlanAhead(planner, draws_of(BATCHES, whole_rows(LENGTHS)), 1)
    step = ahead.step(0, 0)
    assert step is not None
    assert replace(planner.plan(step.lengths), planning_s=step.plan.planning_s) == step.plan
    ahead.close()


def test_plans_that_nobody_improves_stay_as_they_are() -> None:
    """Where plans are not to be improved, a plan comes back as it is, and no process is there to improve it."""
    planner = Planner(COST, 4)
    source = planned_elsewhere(lambda: planner, improves=False)
    plan = planner.static(LENGTHS)
    assert source.improve(plan, LENGTHS) is plan
    assert source.improving is None
    source.close()


def test_plans_made_before_a_refit_stay_as_they_are() -> None:
    """What another cost model made is not improved by this one, and that is no failure."""
    planners = [Planner(COST, 4)]
    source = planned_elsewhere(lambda: planners[-1], improves=True)
    plan = source.plan(LENGTHS)
    planners.append(Planner(replace(COST, linear_s_per_token=3 * COST.linear_s_per_token), 4))
    assert source.improve(plan, LENGTHS) is plan
    source.close()


def test_a_planner_that_hangs_costs_a_plan_but_no_step(caplog: pytest.LogCaptureFixture) -> None:
    """After the limit the step has a simpler plan, and the reason is said in words."""
    planner = Planner(COST, 4)
    process = PlannerProcess(lambda: planner)
    source = ScriptedSource(process.plan, planner.static, close=process.close)
    ahead = PlanAhead(source, draws_of(BATCHES, whole_rows(LENGTHS)), 0)
    ahead.step(0, 0)
    assert process._process is not None
    process._process.send_signal(signal.SIGSTOP)
    process._limit_s = 0.5
    with caplog.at_level(logging.WARNING):
        step = ahead.step(0, 1)
    assert step.plan == replace(planner.static(step.lengths), planning_s=step.plan.planning_s)
    [record] = caplog.records
    assert "Planning step 1 of epoch 0 failed; using a simpler plan: " in record.getMessage()
    assert "no answer within 0.5 s" in record.getMessage()
    assert record.exc_info is None
    ahead.close()


def test_a_long_wait_is_said_while_it_lasts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Not only afterwards: what never comes would never be said."""
    monkeypatch.setattr(plan_ahead, "LONG_S", 0.05)
    go_on = threading.Event()

    def plan(lengths: Sequence[int]) -> Plan:
        until(lambda: "waited 0.05 s for its plan" in caplog.text)
        go_on.set()
        return ScriptedPlanner(4).plan(lengths)

    source = make(plan, num_ahead=0)
    with caplog.at_level(logging.WARNING):
        source.step(0, 0)
    assert go_on.is_set()
    source.close()
