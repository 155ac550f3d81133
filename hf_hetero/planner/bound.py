"""This module computes certified lower bounds: no plan of a batch is faster.

All of them add up rank-seconds. With `M` micro-batches, `N` ranks and fixed seconds `b`, a step takes at least
`M * b + work / N`, where the work of a sample depends on the smallest degree that can hold it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_hetero.planner.problem import Problem

MOST_DURATIONS = 16
"""Durations, at most, between which `duration_bound` interpolates; any number gives a bound. Half: ±0.0 %, bound
-0.1 %, CPU -3 %; double: ±0.0 %, bound -0.1 %, CPU -1 % (all)."""
ROUNDING = 1 - 1e-12
"""Left of a bound for the rounding of its sums, so that a plan that reaches it is not below it."""

Floats = NDArray[np.float64]


def lower_bound(problem: Problem) -> float:
    """Return the seconds below which no plan of this batch can be: the best of three bounds."""
    if not problem.lengths:
        return 0.0
    return max(area_bound(problem), longest_bound(problem), duration_bound(problem)) * ROUNDING


def area_bound(problem: Problem) -> float:
    """Bound a step, in seconds, by all samples at their cheapest degrees, spread evenly, in fewest micro-batches."""
    work = _least_work(problem, float("inf"))
    return problem.fewest_micro_batches * min(problem.fixed_s) + float(work.sum()) / problem.num_ranks


def longest_bound(problem: Problem) -> float:
    """Bound a step, in seconds, by its longest sample alone, at its fastest degree."""
    longest = problem.lengths[0]
    return min(problem.cost.seconds([longest], d) for d in problem.degrees if longest <= problem.capacity * d)


def duration_bound(problem: Problem) -> float:
    """Bound a step, in seconds, by its area, given how long the longest micro-batch lasts, at the best such duration.

    Let it last `t`. It holds the longest sample, and tokens for at most the memory of all ranks; the work of the others
    is done elsewhere. And no sample can be at a degree at which it alone takes longer than `t`, so that all the work is
    what it is at `t`. Between two of the durations tried, `t` is rounded down and the degrees are those of the upper.
    """
    durations = _durations(problem)
    fixed_s = min(problem.fixed_s)
    others_s = (problem.fewest_micro_batches - 1) * fixed_s
    area_s = area_bound(problem)
    bounds: list[float] = []
    for shortest_s, next_s in zip(durations, [*durations[1:], float("inf")], strict=True):
        work = _least_work(problem, next_s)
        elsewhere = _without_longest_tokens(problem, work)
        spread_s = others_s + fixed_s + float(work.sum()) / problem.num_ranks
        bounds.append(max(shortest_s + others_s + elsewhere / problem.num_ranks, spread_s))
        if bounds[-1] <= area_s:
            break  # the least of them is no better than the area bound, whatever the others are
    return min(bounds)


def _durations(problem: Problem) -> list[float]:
    """List where the choice of degrees changes, ascending: what long samples take alone; a few of them, if many.

    Any but the first may be left out: `duration_bound` rounds down between those that stay, and is only weaker.
    """
    fastest_s = longest_bound(problem)
    alone = {fastest_s}
    for length in problem.lengths:
        slowest_s = max(problem.cost.seconds([length], d) for d in problem.degrees if length <= problem.capacity * d)
        if slowest_s <= fastest_s:
            break  # shorter samples have every degree
        alone |= {problem.cost.seconds([length], d) for d in problem.degrees if length <= problem.capacity * d}
    later = sorted(seconds for seconds in alone if seconds > fastest_s)
    step = -(-len(later) // MOST_DURATIONS) or 1
    return [fastest_s, *later[::step]]


def _least_work(problem: Problem, below_s: float) -> Floats:
    """Return the rank-seconds of each sample at the cheapest degree that holds it in less time than this, or inf."""
    lengths = np.array(problem.lengths, dtype=np.float64)
    attention = problem.cost.attention_s_per_token2
    cheapest = np.full(len(lengths), np.inf)
    for degree, linear_s, fixed_s in zip(problem.degrees, problem.linear_s, problem.fixed_s, strict=True):
        work = (attention * lengths + linear_s) * lengths
        # a hair more time than asked for: rounding may let in a degree, which lowers the bound, but never shut one out
        usable = (lengths <= problem.capacity * degree) & (fixed_s + work / degree < below_s * (1 + 1e-9))
        cheapest[usable] = np.minimum(cheapest[usable], work[usable])
    return cheapest


def _without_longest_tokens(problem: Problem, work: Floats) -> float:
    """Return the rank-seconds that are left when one micro-batch is filled with the samples that cost most a token.

    These are the longest: a shorter sample has at least the same degrees, so that none of its tokens costs more.
    """
    tokens = np.array(problem.tokens_before, dtype=np.float64)
    filled = min(float(problem.num_ranks * problem.capacity), float(tokens[-1]))
    work_before = np.concatenate([[0.0], np.cumsum(work)])
    return max(0.0, float(work_before[-1] - np.interp(filled, tokens, work_before)))
