"""Laws of improving: never worse, never an uncertified bound, and worth its time where the search was stopped early."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from planner.reference import batches, optimal_seconds, problems, small_cost

from hf_hetero.costs import CostModel
from hf_hetero.planner.draft import draft_seconds, to_plan
from hf_hetero.planner.improve.improve import improve_draft
from hf_hetero.planner.problem import make_problem
from hf_hetero.planner.search.fast import fast_draft
from hf_hetero.planner.search.homogeneous import best_homogeneous

pytest.importorskip("mip")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batches(max_ranks=4, max_samples=6))
def test_never_worse_and_never_a_false_bound(batch: tuple[list[int], int, CostModel]) -> None:
    """From the best static plan: valid, no slower, and the bound is below the optimum."""
    lengths, num_ranks, cost = batch
    problem = make_problem(cost, num_ranks, None, lengths)
    start = best_homogeneous(problem)
    assert start is not None
    found = improve_draft(problem, start, 0.0, 0.3, "highs")
    plan = to_plan(problem, found.draft, "mip", 0.0)
    assert problems(plan, lengths, num_ranks, cost) == []
    assert plan.seconds <= draft_seconds(problem, start) * (1 + 1e-9)
    assert found.bound <= optimal_seconds(lengths, num_ranks, cost) * (1 + 1e-9)
    assert (found.solver is None) == (found.draft is start)


def test_a_walk_finds_what_few_tries_missed() -> None:
    """A large batch with a poor start: the walk alone beats it, and says it was a search."""
    chance = random.Random(1)
    lengths = [int(min(700, 20 + chance.paretovariate(1.1) * 10)) for _ in range(80)]
    problem = make_problem(small_cost(100, (2, 4, 8)), 8, None, lengths)
    fast = fast_draft(problem)
    assert fast is not None
    slow = [[group] for micro_batch in fast for group in micro_batch]  # one group after the other
    found = improve_draft(problem, slow, 0.0, 1.0, "highs")
    assert found.solver is not None
    assert draft_seconds(problem, found.draft) < draft_seconds(problem, slow)
