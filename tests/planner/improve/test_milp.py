"""Laws of the integer program."""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from planner.reference import batches, optimal_seconds, problems, small_cost

from hf_hetero.costs import CostModel
from hf_hetero.errors import ConfigError, HeteroError
from hf_hetero.plan import Group, MicroBatch, Plan
from hf_hetero.planner import Planner
from hf_hetero.planner.improve.program import Backend

pytest.importorskip("mip")

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@few
@given(batches(max_ranks=4, max_samples=6))
def test_small_batches_are_solved_to_the_optimum(batch: tuple[list[int], int, CostModel]) -> None:
    """It finds what trying every plan finds."""
    lengths, num_ranks, cost = batch
    plan = Planner(cost, num_ranks, solver="mip", mip_time_limit_s=100.0).plan(lengths)
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
    """A poor plan becomes a good one that says who made it and that none is faster; a good one comes back as it is."""
    cost, lengths = small_cost(), [60, 50, 50, 40, 30, 20]
    alone = tuple(MicroBatch((Group((0,), (sample,)), Group((1,), ()))) for sample in range(6))
    poor = Plan(2, alone)  # six micro-batches, where two would do
    poor = replace(poor, seconds=cost.plan_seconds(poor, lengths))
    planner = Planner(cost, 2, mip_time_limit_s=100.0)  # it ends when nothing is left to prove
    better = planner.improve(poor, lengths)
    assert better.solver == "mip"
    assert better.seconds == pytest.approx(optimal_seconds(lengths, 2, cost))
    assert better.gap < 1e-3
    assert planner.improve(better, lengths).micro_batches == better.micro_batches


def test_improving_a_large_batch_proves_more() -> None:
    """Where the batch is too large to be solved whole, the relaxation raises the bound, not above the plan.

    Three samples need four ranks each: memory would allow one micro-batch of eight, the groups do not.
    """
    cost, rng = small_cost(100, (2, 4)), random.Random(0)
    lengths = [260, 250, 240] + [rng.randint(1, 3) for _ in range(40)]
    planner = Planner(cost, 8, mip_time_limit_s=8.0)
    plan = planner.plan(lengths)
    better = planner.improve(plan, lengths)
    assert plan.lower_bound_s * 1.01 < better.lower_bound_s <= better.seconds <= plan.seconds


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_both_solvers_find_the_optimum(backend: Backend) -> None:
    """The program does not depend on who solves it."""
    cost, lengths = small_cost(), [60, 50, 50, 40, 30, 20, 10]
    plan = Planner(cost, 2, solver="mip", mip_time_limit_s=100.0, mip_backend=backend).plan(lengths)
    assert plan.seconds == pytest.approx(optimal_seconds(lengths, 2, cost))


def test_no_time_at_all_still_gives_a_plan() -> None:
    """A solver that stops before it has found anything costs nothing."""
    lengths = [random.Random(sample).randint(1, 390) for sample in range(60)]
    fast = Planner(small_cost(), 8).plan(lengths)
    plan = Planner(small_cost(), 8, solver="mip", mip_time_limit_s=1e-9).plan(lengths)
    assert plan.seconds <= fast.seconds
    assert plan.lower_bound_s >= fast.lower_bound_s


def test_improve_refuses_the_plan_of_another_batch() -> None:
    """A plan for other samples is not a start."""
    planner = Planner(small_cost(), 2)
    with pytest.raises(ConfigError, match="3 samples on 2 ranks"):
        planner.improve(planner.plan([5, 6, 7]), [5, 6])


def test_improve_refuses_other_lengths() -> None:
    """A plan whose seconds are not those of the lengths given was made for others."""
    planner = Planner(small_cost(), 2)
    with pytest.raises(ConfigError, match="with these lengths"):
        planner.improve(planner.plan([5, 6, 7]), [5, 6, 8])


def test_nothing_to_improve() -> None:
    """No samples, no integer program."""
    planner = Planner(small_cost(), 2, solver="mip")
    empty = planner.plan([])
    assert planner.improve(empty, []) is empty


def test_the_solver_is_loaded_only_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast search works where `mip` is not installed."""
    monkeypatch.setitem(sys.modules, "mip", None)
    assert Planner(small_cost(), 2, solver="auto").plan([5, 6]).micro_batches
    with pytest.raises(HeteroError, match="solver='fast'"):
        Planner(small_cost(), 2, solver="mip").plan([5, 6])
