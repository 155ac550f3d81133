"""Laws of planning very large runs in parts."""

from __future__ import annotations

import random

from planner.reference import problems, small_cost

from hf_hetero.planner import Planner
from hf_hetero.planner.problem import make_problem
from hf_hetero.planner.search.parts import num_parts, plan_in_parts


def test_only_very_large_runs_are_planned_in_parts() -> None:
    """Parts are equal, hold groups of every degree, and have samples."""
    cost = small_cost(1000, (2, 4, 8, 64))
    assert num_parts(make_problem(cost, 1024, None, [5] * 5000)) == 1
    assert num_parts(make_problem(cost, 12288, None, [5] * 5000)) == 12
    assert num_parts(make_problem(cost, 12288, None, [5] * 20)) == 1
    assert num_parts(make_problem(cost, 1031, None, [5] * 5000)) == 1


def test_thousands_of_ranks() -> None:
    """A valid plan near the bound, in which all parts run the same number of micro-batches."""
    drawn = random.Random(0)
    cost = small_cost(1000, (2, 4, 8, 16, 32, 64), micro_batch_s=200.0)
    lengths = [int(drawn.lognormvariate(5.5, 1.1)) % 30_000 + 1 for _ in range(16_384)]
    plan = Planner(cost, 3072).plan(lengths)
    assert problems(plan, lengths, 3072, cost) == []
    assert plan.gap < 0.15


def test_a_part_that_cannot_be_planned_is_told() -> None:
    """The search decides; None goes up, so that the whole is planned at once."""
    problem = make_problem(small_cost(), 2048, None, [5] * 4096)
    assert plan_in_parts(problem, 2, lambda part: None) is None
