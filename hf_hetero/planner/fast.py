"""The fast search: guess how long each micro-batch lasts, pack the samples into that, then squeeze."""

from __future__ import annotations

from statistics import median

from hf_hetero.planner.cuts import Guess, guesses, slowest_full_group
from hf_hetero.planner.descent import Trial, Tries, descend, kick, scale
from hf_hetero.planner.draft import Draft
from hf_hetero.planner.parts import num_parts, plan_in_parts
from hf_hetero.planner.problem import Problem

MOST_TRIES = 52
FEWEST_TRIES = 14
TRIED_SAMPLES = 600_000
TRIES_A_GUESS = 5
TRIES_WHEN_FULL = 16
FULL_STEP = 0.2
WORTH_TRYING = 1.03
MUCH_LONGER = 1.25


def fast_draft(problem: Problem) -> Draft | None:
    """The best plan that a fixed number of packings finds, or None where none of them holds the samples."""
    parts = num_parts(problem)
    return (plan_in_parts(problem, parts, _search) if parts > 1 else None) or _search(problem)


def _search(problem: Problem) -> Draft | None:
    """Try a few guesses, and squeeze the best of them."""
    num_tries = TRIED_SAMPLES // (len(problem.lengths) + problem.num_ranks)
    tries = Tries(problem, max(FEWEST_TRIES, min(MOST_TRIES, num_tries)))
    found = guesses(problem)
    best = _full(tries)
    for guess in [*(_levelled(guess) for guess in found[:1]), *found]:
        limit_s = best.seconds * WORTH_TRYING if best else float("inf")
        if guess.seconds <= limit_s:
            trial = scale(tries, guess.durations, limit_s, TRIES_A_GUESS)
            if trial is not None and (best is None or trial.seconds < best.seconds):
                best = trial
    if best is None:
        return None
    return kick(tries, descend(tries, best)).packing.draft(problem)


def _full(tries: Tries) -> Trial | None:
    """As few micro-batches as memory allows, of any duration: too full for a fluid, they may still hold the samples."""
    problem = tries.problem
    trial = tries.pack([slowest_full_group(problem)] * problem.fewest_micro_batches)
    return trial and descend(tries, trial, FULL_STEP, TRIES_WHEN_FULL)


def _levelled(guess: Guess) -> Guess:
    """Micro-batches that are not much longer than most last equally long: short samples will fill the ends of all."""
    limit_s = median(guess.durations) * MUCH_LONGER
    short = [seconds for seconds in guess.durations if seconds <= limit_s]
    level = sum(short) / len(short)
    return Guess(guess.seconds, tuple(seconds if seconds > limit_s else level for seconds in guess.durations))
