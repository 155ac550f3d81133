"""Laws of checking a batch. What is refused is tested in `test_planner.py`, where users meet it."""

from __future__ import annotations

from planner.reference import small_cost

from hf_hetero.planner.problem import make_problem, usable_degrees


def test_samples_descend_and_keep_their_names() -> None:
    """Equal samples keep the caller's order."""
    problem = make_problem(small_cost(), 2, None, [5, 9, 5, 7])
    assert problem.lengths == (9, 7, 5, 5)
    assert problem.order == (1, 3, 0, 2)
    assert problem.num_tokens == 26


def test_degrees_that_tile() -> None:
    """Powers of two up to the limit, and all ranks together; others cannot be aligned beside each other."""
    cost = small_cost(100, (2, 3, 4, 6, 8, 12))
    assert usable_degrees(cost, 12) == (1, 2, 4, 8, 12)
    assert usable_degrees(cost, 6) == (1, 2, 4, 6)
    assert usable_degrees(cost, 12, max_degree=8) == (1, 2, 4, 8)
    assert usable_degrees(cost, 1) == (1,)


def test_micro_batches_that_memory_asks_for() -> None:
    """Counted in whole tokens: one token more than the memory is one micro-batch more."""
    assert make_problem(small_cost(100), 4, None, [100] * 8).fewest_micro_batches == 2
    assert make_problem(small_cost(100), 4, None, [100] * 8 + [1]).fewest_micro_batches == 3
