"""Laws of naming the ranks."""

from __future__ import annotations

from planner.reference import small_cost

from hf_hetero.plan_in_words import describe_degrees
from hf_hetero.planner.draft import from_plan, to_plan
from hf_hetero.planner.problem import make_problem

LENGTHS = [10, 300, 20, 90]


def test_groups_are_aligned_slow_micro_batches_first_and_ranks_left_over_wait() -> None:
    """Large groups come first, so that each starts at a multiple of its degree; samples get the caller's names."""
    problem = make_problem(small_cost(), 8, None, LENGTHS)
    plan = to_plan(problem, [[(1, [3])], [(1, [2]), (4, [0]), (2, [1])]], "fast", 1.0)
    assert describe_degrees(plan) == "[4 2 1x2] [1x8]"
    assert [(group.ranks, group.samples) for group in plan.micro_batches[0].groups] == [
        ((0, 1, 2, 3), (1,)),
        ((4, 5), (3,)),
        ((6,), (2,)),
        ((7,), ()),
    ]
    assert plan.seconds == small_cost().plan_seconds(plan, LENGTHS)


def test_there_and_back() -> None:
    """A plan read back is the draft it was made of."""
    problem = make_problem(small_cost(), 8, None, LENGTHS)
    draft = [[(4, [0]), (2, [1]), (1, [2])], [(1, [3])]]
    assert from_plan(problem, to_plan(problem, draft, "fast", 0.0)) == draft
