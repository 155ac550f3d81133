"""Laws of the integer program."""

from __future__ import annotations

import sys

import pytest
from hypothesis import HealthCheck, given, settings
from planner.reference import batches, optimal_seconds, problems, small_cost

from hf_hetero.cost_model import CostModel
from hf_hetero.errors import ConfigError
from hf_hetero.planner import Planner

pytest.importorskip("mip")

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@few
@given(batches(max_ranks=4, max_samples=6))
def test_small_batches_are_solved_to_the_optimum(batch: tuple[list[int], int, CostModel]) -> None:
    """It finds what trying every plan finds."""
    lengths, num_ranks, cost = batch
    plan = Planner(cost, num_ranks, solver="mip", mip_time_limit_s=30.0).plan(lengths)
    assert problems(plan, lengths, num_ranks, cost) == []
    assert plan.seconds == pytest.approx(optimal_seconds(lengths, num_ranks, cost), rel=1e-5)


@few
@given(batches(max_ranks=8, max_samples=24))
def test_never_slower_than_the_fast_search(batch: tuple[list[int], int, CostModel]) -> None:
    """It starts from the fast plan, and gives that back when time runs out."""
    lengths, num_ranks, cost = batch
    fast = Planner(cost, num_ranks).plan(lengths)
    plan = Planner(cost, num_ranks, solver="mip", mip_time_limit_s=0.2).plan(lengths)
    assert problems(plan, lengths, num_ranks, cost) == []
    assert plan.lower_bound_s * (1 - 1e-9) <= plan.seconds <= fast.seconds * (1 + 1e-9)


def test_improve_gives_back_the_better_plan() -> None:
    """A poor plan becomes a good one that says who made it; a good one comes back as it is."""
    cost, lengths = small_cost(), [60, 50, 50, 40, 30, 20]
    poor = Planner(cost, 2, max_degree=1).plan([100] * 6)  # three micro-batches, where two would do
    planner = Planner(cost, 2, mip_time_limit_s=10.0)
    better = planner.improve(poor, lengths)
    assert better.solver == "mip"
    assert better.seconds == pytest.approx(optimal_seconds(lengths, 2, cost))
    assert planner.improve(better, lengths) is better


def test_improve_refuses_the_plan_of_another_batch() -> None:
    """A plan for other samples is not a start."""
    planner = Planner(small_cost(), 2)
    with pytest.raises(ConfigError, match="3 samples on 2 ranks"):
        planner.improve(planner.plan([5, 6, 7]), [5, 6])


def test_nothing_to_improve() -> None:
    """No samples, no integer program."""
    planner = Planner(small_cost(), 2, solver="mip")
    empty = planner.plan([])
    assert planner.improve(empty, []) is empty


def test_the_solver_is_loaded_only_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast search works where `mip` is not installed."""
    monkeypatch.setitem(sys.modules, "mip", None)
    assert Planner(small_cost(), 2, solver="auto").plan([5, 6]).micro_batches
    with pytest.raises(ImportError):
        Planner(small_cost(), 2, solver="mip").plan([5, 6])
