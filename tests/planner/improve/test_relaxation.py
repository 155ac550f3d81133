"""Laws of the relaxed bound: no plan is faster, and it proves more than adding up work."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from planner.reference import batches, optimal_seconds, small_cost

from hf_hetero.costs import CostModel
from hf_hetero.planner.bound import area_bound, lower_bound
from hf_hetero.planner.improve import relaxation
from hf_hetero.planner.improve.relaxation import relaxed_bound
from hf_hetero.planner.planner import Planner
from hf_hetero.planner.problem import make_problem

pytest.importorskip("mip")


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batches(max_ranks=6, max_samples=6))
def test_no_plan_is_faster(batch: tuple[list[int], int, CostModel]) -> None:
    """Never above the optimum, found by trying every plan."""
    lengths, num_ranks, cost = batch
    optimum = optimal_seconds(lengths, num_ranks, cost)
    assert relaxed_bound(make_problem(cost, num_ranks, None, lengths), 1.5 * optimum + 1.0, 20.0) <= optimum * (
        1 + 1e-9
    )


@pytest.mark.parametrize(("lengths", "micro_batch_s", "latency_s"), [([1, 1, 2, 1], 0.1, 0.5), ([1], 0.0, 0.0)])
def test_a_claim_survives_the_solver(lengths: list[int], micro_batch_s: float, latency_s: float) -> None:
    """Where a solver's presolve removed the optimum, and where classes were halved until it took them for nothing."""
    cost = CostModel(0.0, 0.0, micro_batch_s, 0.0, {2: 0.5}, 1.0, 0.0, 1.0, all_to_all_latency_s={2: latency_s})
    optimum = optimal_seconds(lengths, 4, cost)
    assert relaxed_bound(make_problem(cost, 4, None, lengths), 1.5 * optimum + 1.0, 5.0) <= optimum * (1 + 1e-9)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batches(max_ranks=4, max_samples=7))
def test_no_plan_is_faster_where_samples_are_taken_together(batch: tuple[list[int], int, CostModel]) -> None:
    """The same with so few kinds that most samples share one."""
    lengths, num_ranks, cost = batch
    optimum = optimal_seconds(lengths, num_ranks, cost)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relaxation, "NUM_KINDS", (3,))
        patch.setattr(relaxation, "NUM_CLASSES", 4)
        bound = relaxed_bound(make_problem(cost, num_ranks, None, lengths), 1.5 * optimum + 1.0, 20.0)
    assert bound <= optimum * (1 + 1e-9)


def test_it_sees_the_ranks_that_a_long_sample_keeps() -> None:
    """Two long samples on all ranks one after the other, or side by side: either way more than the work says."""
    cost, lengths = small_cost(100, (2, 4)), [300, 290] + [40] * 4
    problem = make_problem(cost, 4, None, lengths)
    optimum = optimal_seconds(lengths, 4, cost)
    bound = relaxed_bound(problem, Planner(cost, 4).plan(lengths).seconds, 20.0)
    assert lower_bound(problem) * 1.01 < bound <= optimum


def test_crowding_counts_samples_above_half_a_group() -> None:
    """Five samples of 60 of 100 tokens take five groups, though three would have the memory: 2.5 times two ranks."""
    cost = small_cost(100, ())
    problem = make_problem(cost, 2, None, [60] * 5)
    bound = relaxed_bound(problem, 1e4, 20.0)
    assert bound >= 2.5 * cost.seconds([60], 1) * 0.999
    assert bound > lower_bound(problem) * 1.08


def test_no_time_no_bound() -> None:
    """A solver that is stopped at once proves nothing: what is left is the area bound."""
    lengths = list(range(1, 200))
    problem = make_problem(small_cost(), 8, None, lengths)
    assert relaxed_bound(problem, 1e6, 1e-9) == pytest.approx(area_bound(problem), rel=2e-5)
    assert area_bound(problem) <= Planner(small_cost(), 8).plan(lengths).seconds
