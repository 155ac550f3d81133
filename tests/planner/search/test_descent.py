"""Laws of the search over durations."""

from __future__ import annotations

import random

import pytest
from planner.reference import small_cost

from hf_hetero.planner.problem import Problem, make_problem
from hf_hetero.planner.search.cuts import guesses, slowest_full_group
from hf_hetero.planner.search.descent import Tries, descend, kick, scale


@pytest.fixture
def problem() -> Problem:
    drawn = random.Random(0)
    return make_problem(small_cost(1000), 8, None, [int(drawn.lognormvariate(5, 1)) % 3000 + 1 for _ in range(100)])


def test_it_never_gets_slower_and_never_tries_more_than_it_may(problem: Problem) -> None:
    """Each stage starts from what the one before found; the count of tries is a hard limit."""
    tries = Tries(problem, 40)
    start = tries.pack([slowest_full_group(problem)] * (problem.fewest_micro_batches + 1))
    assert start is not None
    shorter = descend(tries, start, 0.06, most=10)
    assert tries.left >= 29
    assert shorter.seconds < start.seconds
    kicked = kick(tries, shorter)
    assert kicked.seconds <= shorter.seconds
    assert tries.left >= -1


def test_a_guess_is_stretched_until_it_fits(problem: Problem) -> None:
    """A guess that is too short comes back longer, and close to what fits."""
    guess = guesses(problem)[0]
    trial = scale(Tries(problem, 100), [seconds * 0.97 for seconds in guess.durations], float("inf"), 12)
    assert trial is not None
    assert trial.seconds < guess.seconds * 1.1


def test_a_guess_that_cannot_win_is_given_up(problem: Problem) -> None:
    """Nothing that takes longer than the limit is looked for."""
    tries = Tries(problem, 100)
    assert scale(tries, guesses(problem)[0].durations, 1.0, 12) is None
    assert tries.left == 100
