"""Laws of the lower bounds. That no plan is faster is checked against all plans in `test_planner.py`."""

from __future__ import annotations

import pytest
from planner.reference import optimal_seconds, small_cost

from hf_hetero.planner import Planner
from hf_hetero.planner.bound import area_bound, duration_bound, longest_bound, lower_bound
from hf_hetero.planner.problem import make_problem


def test_area_bound_by_hand() -> None:
    """Two micro-batches of 50 s, and on 2 ranks the seconds of three samples at their cheapest degrees."""
    problem = make_problem(small_cost(100, (2,)), 2, None, [150, 100, 50])
    work = (1e-3 * 150**2 + 1.1 * 150) + (1e-3 * 100**2 + 100) + (1e-3 * 50**2 + 50)
    assert area_bound(problem) == pytest.approx(2 * 50 + work / 2)


def test_longest_bound_by_hand() -> None:
    """A sample at its fastest degree."""
    problem = make_problem(small_cost(100, (2, 4)), 4, None, [150, 20])
    assert longest_bound(problem) == pytest.approx(50 + (1e-3 * 150**2 + 1.1 * 150) / 4)


def test_what_the_longest_micro_batch_cannot_hold_is_added() -> None:
    """While one long sample runs, memory is full; the other samples need another micro-batch after it."""
    cost = small_cost(100, (2,))
    lengths = [200] + [100] * 6
    problem = make_problem(cost, 4, None, lengths)
    assert duration_bound(problem) > max(area_bound(problem), longest_bound(problem))
    assert lower_bound(problem) <= optimal_seconds(lengths, 4, cost)


def test_the_bound_is_met_where_nothing_is_lost() -> None:
    """Samples that fill every rank alike: the plan is as fast as its bound, so both are right."""
    plan = Planner(small_cost(100), 8).plan([100] * 24)
    assert plan.seconds == pytest.approx(plan.lower_bound_s)
    assert plan.gap < 1e-9
