"""Cuts give first guesses: how many micro-batches, and how long each of them lasts, as if samples were a fluid.

Sorted samples are cut into consecutive runs, one a micro-batch (FlexSP's "blaster", arXiv:2412.01523, section 4.2), but
the cuts minimise the sum of the durations, not the largest number of tokens, and all numbers of micro-batches are
solved at once: with the durations to choose among fixed, a run's start is a look-up, and the cuts are a shortest path.

A guess need not be true: `packing.pack` says what fits, so what is rough here costs time, and never makes a wrong plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_hetero.planner.problem import Problem

NUM_DURATIONS = 48
"""Rungs of the ladder of durations that guesses choose among; each is a row of all tables. Half: +0.2 % (-0.3 to
+2.4), CPU -5 %; double: ±0.0 % (-0.5 to +1.3), CPU +10 % (all)."""
MOST_CUTS = 1024
"""Positions, about, where runs may end in a batch of more samples than that. Half: +0.1 % (0 to +0.6), CPU +7 %;
double: ±0.0 %, CPU -1 % (large)."""
LONGEST_APART = 128
"""In such a batch, so many of the longest samples may be the last of a run. Half: ±0.0 %, CPU -2 %; double: ±0.0 %,
CPU -3 % (large)."""
LONGEST_ALONE = 8
"""Longest samples whose own seconds, at each degree, are durations to choose, too. Half: ±0.0 % (-0.4 to +0.5), CPU
-3 %; double: +0.1 % (-0.6 to +2.4), CPU +9 % (all)."""
PATIENCE = 2
"""Numbers of micro-batches that may fail to help before no more are tried. Half: ±0.0 %, CPU -0 %; double: ±0.0 %,
CPU +2 % (all)."""
MOST_CAREFUL = 2
"""Careful guesses that are handed on, beside a bold one. Half: ±0.0 % (-0.5 to 0), CPU +1 %; double: ±0.0 %, CPU +2
% (all)."""
MOST_EXTRA = 16
"""Micro-batches, at most, beyond those that memory asks for. Half: ±0.0 %, CPU -1 %; double: ±0.0 %, CPU -1 % (all)."""
TINY = 1e-30
"""Keeps quotients finite where a cost is 0."""

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]


@dataclass(frozen=True)
class Guess:
    """A `Guess` is the durations of the micro-batches of a plan that may exist.

    Args:
        seconds: of the step.
        durations: seconds of each micro-batch, descending.
    """

    seconds: float
    durations: tuple[float, ...]


def guesses(problem: Problem) -> list[Guess]:
    """Return a few guesses that are worth trying, the most likely first.

    The careful ones expect that ranks which a long sample needs but does not fill are lost as far as short samples are
    dearer there; the bold one, for the fewest micro-batches that memory allows, expects that nothing is lost.
    """
    durations = _durations(problem)
    index, ranks = _demand(problem, durations)
    impossible = (index == len(problem.degrees)).sum(axis=1)  # these are the longest samples
    index = np.minimum(index, len(problem.degrees) - 1)
    lost = 1 - problem.linear_s[0] / np.maximum(problem.linear_s, TINY)
    careful = ranks + lost[index] * (np.array(problem.degrees, dtype=np.float64)[index] - ranks)
    cautious = _shortest_paths(problem, durations, _reach(problem, careful, impossible), PATIENCE)[:MOST_CAREFUL]
    return cautious + _shortest_paths(problem, durations, _reach(problem, ranks, impossible), 0)[:1]


def slowest_full_group(problem: Problem) -> float:
    """Return seconds that no group which memory allows exceeds."""
    slope = max(problem.linear_s) + problem.cost.attention_s_per_token2 * problem.lengths[0]
    return max(problem.fixed_s) + slope * min(problem.capacity, problem.num_tokens) * 1.02 + 1e-9


def _durations(problem: Problem) -> Floats:
    """List durations to choose among, ascending: a ladder, and what the longest samples take alone at each degree.

    The ladder goes from a fraction of the fastest run of the longest sample to the slowest group that fills its memory.
    """
    longest, fixed_s = problem.lengths[0], problem.fixed_s[0]
    alone = [
        problem.cost.seconds([length], degree)
        for length in problem.lengths[:LONGEST_ALONE]
        for degree in problem.degrees
        if length <= problem.capacity * degree
    ]
    fastest_s = min(problem.cost.seconds([longest], d) for d in problem.degrees if longest <= problem.capacity * d)
    slowest = max(slowest_full_group(problem), max(alone)) - fixed_s
    fastest = max((fastest_s - fixed_s) / 20, slowest / 1e4)
    ladder = fixed_s + np.geomspace(fastest, slowest, NUM_DURATIONS)
    return np.unique(np.concatenate([ladder, [s * (1 + 1e-9) for s in alone if ladder[0] < s < ladder[-1]]]))


def _demand(problem: Problem, durations: Floats) -> tuple[Positions, Floats]:
    """For each duration (outer) and sample, find the index of the smallest degree that holds it, and the ranks filled.

    A group of degree d lasts as long as a duration where `attention * s**2 + linear * s = d * time`; the longest sample
    is the root of that, in the form that stays exact where attention costs next to nothing.
    """
    attention, lengths = problem.cost.attention_s_per_token2, np.array(problem.lengths, dtype=np.float64)
    degrees, linear_s = np.array(problem.degrees, dtype=np.float64), np.array(problem.linear_s)
    time = np.maximum(durations[:, None] - np.array(problem.fixed_s), 0.0)
    work = degrees * time
    slope = linear_s + np.sqrt(linear_s * linear_s + 4 * attention * work)
    by_time = np.where(work > 0, 2 * work / np.maximum(slope, TINY), -1.0)
    longest = np.maximum.accumulate(np.minimum(by_time, problem.capacity * degrees), axis=1)
    index = np.zeros((len(durations), len(lengths)), dtype=np.intp)
    for column in range(len(degrees)):
        index += lengths > longest[:, column, None]
    known = np.minimum(index, len(degrees) - 1)
    work = (attention * lengths + linear_s[known]) * lengths
    time = np.maximum(durations[:, None] - np.array(problem.fixed_s)[known], TINY)
    return index, np.minimum(np.maximum(work / time, lengths / problem.capacity), degrees[known])


def _reach(problem: Problem, ranks: Floats, impossible: Positions) -> Positions:
    """For each duration (outer) and each possible end of a micro-batch, find the first cut where it may start."""
    cuts = _possible_cuts(problem)
    reach = np.empty((len(ranks), len(cuts)), dtype=np.intp)
    for row in range(len(ranks)):
        first = int(impossible[row])
        before: Floats = np.concatenate([np.zeros(first + 1), np.cumsum(ranks[row, first:])])[cuts]
        start = int(np.searchsorted(cuts, first))
        # demands are positive, so `before` ascends, and the longest run that the ranks hold starts at a look-up; none
        # starts before the samples that this duration cannot hold at any degree
        reach[row] = np.maximum(np.searchsorted(before, before - problem.num_ranks * (1 + 1e-9)), start)
        reach[row, : start + 1] = np.arange(start + 1)
    return reach


def _possible_cuts(problem: Problem) -> Positions:
    """List where a run of samples may end: everywhere in a small batch, else about every so many tokens."""
    num = len(problem.lengths)
    if num <= MOST_CUTS:
        return np.arange(num + 1, dtype=np.intp)
    tokens = np.array(problem.tokens_before, dtype=np.float64)
    marks: Floats = np.linspace(0, float(tokens[-1]), MOST_CUTS)
    steps: Positions = np.searchsorted(tokens, marks)
    return np.unique(np.concatenate([np.arange(LONGEST_APART, dtype=np.intp), steps, np.array([num], dtype=np.intp)]))


def _shortest_paths(problem: Problem, durations: Floats, reach: Positions, patience: int) -> list[Guess]:
    """Return the best guess for each number of micro-batches, fastest first; stop when more of them do not help.

    `seconds[end]` is the least sum of durations of so many runs that together hold the samples before `end`; with one
    run more it follows from the last one, as in Bellman's and Ford's shortest paths.
    """
    position = np.arange(reach.shape[1], dtype=np.intp)
    possible = np.where(reach < position, 0.0, np.inf) + durations[:, None]
    seconds = np.full(len(position), np.inf)
    seconds[0] = 0.0
    choices: list[Positions] = []
    guessed: list[Guess] = []
    while len(choices) < len(problem.lengths):
        # A run that ends here and lasts so long starts as early as it can: what is left over is then a part of what any
        # later start leaves, and a part never takes longer than the whole. So one start for each duration will do.
        ends = seconds[reach] + possible
        choice = ends.argmin(axis=0)
        seconds = ends[choice, position]
        choices.append(choice)
        if len(choices) >= problem.fewest_micro_batches:
            if seconds[-1] < np.inf:
                guessed.append(_walk_back(durations, reach, choices))
            best = min(range(len(guessed)), key=lambda i: guessed[i].seconds, default=-1)
            patient = len(guessed) - 1 - best < patience and len(choices) < problem.fewest_micro_batches + MOST_EXTRA
            if not patient and (guessed or patience == 0):
                break
    return sorted(guessed, key=lambda guess: guess.seconds)


def _walk_back(durations: Floats, reach: Positions, choices: list[Positions]) -> Guess:
    """Follow the choices back, from the shortest sample to the longest, and return their durations as a guess."""
    position = reach.shape[1] - 1
    chosen: list[float] = []
    for choice in reversed(choices):
        chosen.append(float(durations[choice[position]]))
        position = int(reach[choice[position], position])
    return Guess(sum(chosen), tuple(sorted(chosen, reverse=True)))
