"""Laws of the plans with one degree."""

from __future__ import annotations

from hypothesis import given, settings
from planner.reference import batches, small_cost

from hf_hetero.costs import CostModel
from hf_hetero.planner.draft import draft_seconds, tiling, to_plan
from hf_hetero.planner.problem import make_problem
from hf_hetero.planner.search.homogeneous import best_homogeneous


@settings(max_examples=100, deadline=None)
@given(batches())
def test_one_degree_and_smaller_ones_in_the_ranks_left_over(batch: tuple[list[int], int, CostModel]) -> None:
    """Every batch that can be planned has such a plan, and it is valid."""
    lengths, num_ranks, cost = batch
    problem = make_problem(cost, num_ranks, None, lengths)
    draft = best_homogeneous(problem)
    assert draft is not None
    assert to_plan(problem, draft, "homogeneous", 0.0).num_samples == len(lengths)
    largest = max(degree for groups in draft for degree, _ in groups)
    for groups in draft:
        tiles = tiling(num_ranks, largest, problem.degrees)
        for degree, samples in groups:
            assert sum(problem.lengths[sample] for sample in samples) <= problem.capacity * degree
            tiles.remove(degree)


def test_only_what_is_below_is_of_interest() -> None:
    """A limit that the best plan does not beat gives None; a little above it gives the plan."""
    problem = make_problem(small_cost(), 8, None, [100, 60, 40] * 12)
    draft = best_homogeneous(problem)
    assert draft is not None
    seconds = draft_seconds(problem, draft)
    assert best_homogeneous(problem, seconds) is None
    assert best_homogeneous(problem, seconds * 1.001) is not None


def test_ranks_left_over_are_used() -> None:
    """12 ranks at degree 8: the other 4 form one group."""
    assert tiling(12, 8, (1, 2, 4, 8)) == [8, 4]
    assert tiling(7, 4, (1, 4)) == [4, 1, 1, 1]
    assert tiling(3, 3, (1, 2, 3)) == [3]
