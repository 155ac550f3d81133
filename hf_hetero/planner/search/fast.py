"""The fast search guesses how long each micro-batch lasts, packs the samples into that, then squeezes."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from hf_hetero.planner.draft import Draft
from hf_hetero.planner.problem import Problem
from hf_hetero.planner.search.cuts import Guess, guesses, slowest_full_group
from hf_hetero.planner.search.descent import Trial, Tries, descend, kick, scale
from hf_hetero.planner.search.parts import num_parts, plan_in_parts

MOST_TRIES = 52
"""Packings, at most, for one batch. Half: +0.2 % (0 to +1.2), CPU -17 %; double: -0.2 % (-1.6 to 0), CPU +21 %
(all)."""
FEWEST_TRIES = 14
"""Packings, at least, however large the batch is. Half: ±0.0 %, CPU -13 %; double: ±0.0 %, CPU +68 % (huge)."""
TRIED_SAMPLES = 600_000
"""Samples and ranks that all packings together may go through: a packing takes time in proportion. Half: ±0.0 %, CPU
-9 %; double: ±0.0 %, CPU +31 % (large)."""
TRIES_A_GUESS = 5
"""Packings, at most, to make a guess real. Half: +0.2 % (-0.5 to +2.4), CPU -1 %; double: ±0.0 % (-0.1 to +0.5), CPU
+0 % (all)."""
TRIES_WHEN_FULL = 16
"""Packings, at most, to shorten the plan with the fewest micro-batches. Half: ±0.0 % (-0.7 to +0.6), CPU +1 %;
double: ±0.0 % (-0.2 to +0.9), CPU -0 % (all)."""
FULL_STEP = 0.2
"""The same for the plan with the fewest micro-batches, whose durations start far too long. Half: -0.1 % (-1.8 to
+0.3), CPU +3 %; double: ±0.0 % (-1.6 to +1.3), CPU +2 % (all)."""
FIRST_STEP = 0.06
"""First step of a descent, as a share of a micro-batch's seconds. Half: ±0.0 % (-1.3 to +0.5), CPU +1 %; double:
±0.0 % (-0.6 to +0.4), CPU -2 % (all)."""
TRIES_A_RIVAL = 14
"""Packings for each of the two best numbers of micro-batches, before one of them is chosen. Half: ±0.0 % (-0.5 to
+0.2), CPU -1 %; double: ±0.0 % (-0.3 to +0.5), CPU -0 % (all)."""
WORTH_TRYING = 1.03
"""A guess is tried if it promises at most so many times the seconds of the best before it. Half: ±0.0 % (-0.5 to
+0.7), CPU -0 %; double: +0.1 % (0 to +1.0), CPU -0 % (all)."""
WORTH_SQUEEZING = 1.05
"""The second number of micro-batches is squeezed, too, if it is so close to the best. Half: ±0.0 %, CPU +0 %;
double: ±0.0 % (0 to +0.3), CPU -1 % (all)."""
MUCH_LONGER = 1.25
"""Micro-batches beyond so many medians keep their durations where the others are levelled. Half: ±0.0 % (-0.3 to 0),
CPU +0 %; double: ±0.0 %, CPU +1 % (all)."""


def fast_draft(problem: Problem) -> Draft | None:
    """Return the best draft that a fixed number of packings finds, or None where none of them holds the samples."""
    parts = num_parts(problem)
    return (plan_in_parts(problem, parts, _search) if parts > 1 else None) or _search(problem)


def _search(problem: Problem) -> Draft | None:
    """Try a few guesses, squeeze the best of the two best numbers of micro-batches, and go on with the better."""
    num_tries = TRIED_SAMPLES // (len(problem.lengths) + problem.num_ranks)
    tries = Tries(problem, max(FEWEST_TRIES, min(MOST_TRIES, num_tries)))
    by_number: dict[int, Trial] = {}
    for trial in _first_trials(tries):
        known = by_number.get(len(trial.durations))
        if known is None or trial.seconds < known.seconds:
            by_number[len(trial.durations)] = trial
    if not by_number:
        return None
    # descents bring the numbers of micro-batches closer, and may change their order: the second best has its chance
    best, *others = sorted(by_number.values(), key=lambda trial: trial.seconds)
    if others and others[0].seconds <= best.seconds * WORTH_SQUEEZING:
        rivals = [descend(tries, trial, FIRST_STEP, TRIES_A_RIVAL) for trial in (best, others[0])]
        best = min(rivals, key=lambda trial: trial.seconds)
    return kick(tries, descend(tries, best, FIRST_STEP)).packing.draft(problem)


def _first_trials(tries: Tries) -> Iterator[Trial]:
    """Make guesses real, as far as they promise to be about as fast as the best before them."""
    guessed = guesses(tries.problem)
    limit_s = float("inf")
    # first, because it needs no guess, and its seconds say which guesses are worth a try
    trial = _full(tries)
    if trial is not None:
        limit_s = trial.seconds * WORTH_TRYING
        yield trial
    for guess in [*(_levelled(guess) for guess in guessed[:1]), *guessed]:
        if guess.seconds <= limit_s:
            trial = scale(tries, guess.durations, limit_s, TRIES_A_GUESS)
            if trial is not None:
                limit_s = min(limit_s, trial.seconds * WORTH_TRYING)
                yield trial


def _full(tries: Tries) -> Trial | None:
    """Try as few micro-batches as memory allows, of any duration: too full for a fluid, they may still hold all."""
    problem = tries.problem
    trial = tries.pack([slowest_full_group(problem)] * problem.fewest_micro_batches)
    return trial and descend(tries, trial, FULL_STEP, TRIES_WHEN_FULL)


def _levelled(guess: Guess) -> Guess:
    """Level micro-batches that are not much longer than most: short samples will fill the ends of all alike."""
    limit_s = median(guess.durations) * MUCH_LONGER
    short = [seconds for seconds in guess.durations if seconds <= limit_s]
    level = sum(short) / len(short)
    return Guess(guess.seconds, tuple(seconds if seconds > limit_s else level for seconds in guess.durations))
