"""Laws of the first guesses."""

from __future__ import annotations

from hypothesis import given, settings
from planner.reference import batches, small_cost

from hf_hetero.costs import CostModel
from hf_hetero.planner.problem import make_problem
from hf_hetero.planner.search.cuts import MOST_CUTS, guesses, slowest_full_group
from hf_hetero.planner.search.packing import pack


@settings(max_examples=100, deadline=None)
@given(batches())
def test_guesses_are_durations_in_descending_order(batch: tuple[list[int], int, CostModel]) -> None:
    """As many as micro-batches, at least as many as memory asks for, none above the slowest group there can be."""
    lengths, num_ranks, cost = batch
    problem = make_problem(cost, num_ranks, None, lengths)
    slowest_s = slowest_full_group(problem)
    for guess in guesses(problem):
        assert list(guess.durations) == sorted(guess.durations, reverse=True)
        assert len(guess.durations) >= problem.fewest_micro_batches
        alone = max(cost.seconds([s], d) for s in lengths for d in problem.degrees if s <= problem.capacity * d)
        assert guess.durations[0] <= max(slowest_s, alone) * (1 + 1e-6)


@settings(max_examples=100, deadline=None)
@given(batches())
def test_no_full_group_is_slower_than_the_slowest(batch: tuple[list[int], int, CostModel]) -> None:
    """With micro-batches that long, time never keeps a sample out: one for each sample holds them all."""
    lengths, num_ranks, cost = batch
    problem = make_problem(cost, num_ranks, None, lengths)
    assert pack(problem, [slowest_full_group(problem)] * len(lengths)) is not None


def test_long_and_short_samples_are_kept_apart() -> None:
    """One long sample and many short ones: a micro-batch that lasts long, and shorter ones."""
    problem = make_problem(small_cost(1000, (2, 4, 8)), 8, None, [8000] + [500] * 64)
    first, *others = guesses(problem)[0].durations
    assert others
    assert first > 1.5 * max(others)


def test_large_batches_are_cut_at_some_places_only() -> None:
    """More samples than cuts: guesses are still made."""
    problem = make_problem(small_cost(1000), 64, None, list(range(1, MOST_CUTS * 3)))
    assert guesses(problem)
