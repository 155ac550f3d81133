"""Plans are ready before their step, in order, and a failed solve costs a better plan but never a step."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from helpers import LENGTHS, ScriptedPlanner

from hf_hetero import InfeasibleBatch, Plan
from hf_hetero.plan_ahead import PlanAhead
from hf_hetero.sampler import GlobalBatches

BATCHES = GlobalBatches(len(LENGTHS), 8, seed=3)


def make(plan: Any, num_ahead: int = 2, fallback: Any = None) -> PlanAhead:
    return PlanAhead(plan, fallback or ScriptedPlanner(4).plan, BATCHES.rows, LENGTHS, len(BATCHES), num_ahead)


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
    assert done.wait(timeout=10)
    expected = [(0, len(BATCHES) - 1), (1, 0), (1, 1)]
    assert solved == [tuple(LENGTHS[row] for row in BATCHES.rows(*key)) for key in expected]
    assert source.step(1, 0).wait_s == 0.0
    source.close()


def test_late_plan_says_how_long_the_step_waited() -> None:
    """A step that is asked for before its plan is ready waits, and the wait is reported."""

    def plan(lengths: Sequence[int]) -> Plan:
        time.sleep(0.5)
        return ScriptedPlanner(4).plan(lengths)

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
