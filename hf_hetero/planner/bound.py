"""This module computes certified lower bounds: no plan of a batch is faster.

All of them add up rank-seconds. With `M` micro-batches, `N` ranks and fixed seconds `b`, a step takes at least
`M * b + work / N`, where the work of a sample depends on the smallest degree that can hold it.

Where ranks are not alike, a rank-second of rank `r` counts `speed[r]`, so that all ranks together offer `V`, the sum of
their speeds, in a second. A group on ranks `g` that takes `b + t` seconds uses up `t * speed(g)` of that, with
`speed(g)` the sum of its ranks' speeds, and its `t` is the sum of what its samples take there, divided by its degree. A
micro-batch lasts no less than any of its groups, so `V * (seconds - M * b)` is at least the sum over all samples of the
least that a degree, at any place, uses up for one: work there, in rank-seconds, times `speed(g) / degree`. With equal
speeds that is the bound above. No choice of what counts how much makes it wrong, as long as the same is asked of all
groups; speeds are a good one, because then a rank that is slow and busy uses up what it computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_hetero.costs import CostModel
from hf_hetero.costs.places import Place
from hf_hetero.planner.problem import Problem
from hf_hetero.topology import aligned_blocks

MOST_DURATIONS = 16
"""Durations, at most, between which `duration_bound` interpolates; any number gives a bound. Half: ±0.0 %, bound
-0.1 %, CPU -3 %; double: ±0.0 %, bound -0.1 %, CPU -1 % (all)."""
ROUNDING = 1 - 1e-12
"""Left of a bound for the rounding of its sums, so that a plan that reaches it is not below it."""

Floats = NDArray[np.float64]


class Way(NamedTuple):
    """A `Way` is a degree, and a place that groups of this degree can have.

    Args:
        degree: ranks of the group.
        cost: seconds of groups there.
        share: mean speed of its ranks: what a rank-second there counts.
    """

    degree: int
    cost: CostModel
    share: float


def lower_bound(problem: Problem) -> float:
    """Return the seconds below which no plan of this batch can be: the best of three bounds."""
    if not problem.lengths:
        return 0.0
    ways = ways_of(problem)
    bounds = area_bound(problem, ways), longest_bound(problem, ways), duration_bound(problem, ways)
    return max(bounds) * ROUNDING


def ways_of(problem: Problem) -> list[Way]:
    """List what can hold a sample: each degree, at each place where ranks are not alike."""
    cost, ways = problem.cost, dict[tuple[int, Place, float], Way]()
    if not cost.is_uneven:
        return [Way(degree, cost, 1.0) for degree in problem.degrees]
    speeds = [cost.rank_speeds.get(rank, 1.0) for rank in range(problem.num_ranks)]
    for degree in problem.degrees:
        for ranks in aligned_blocks(problem.num_ranks, degree):
            # a hair less than the mean, whose sum is rounded: groups shall not count more than they use up
            place, share = cost.places.of(ranks), sum(speeds[rank] for rank in ranks) / degree * ROUNDING
            ways.setdefault((degree, place, share), Way(degree, cost.at(place), share))
    return list(ways.values())


def speed_of_all(problem: Problem) -> float:
    """Return what all ranks together do in a second, by what one of full speed does: their number if all have that."""
    speeds = problem.cost.rank_speeds
    return sum(speeds.get(rank, 1.0) for rank in range(problem.num_ranks)) if speeds else problem.num_ranks


def area_bound(problem: Problem, ways: Sequence[Way] | None = None) -> float:
    """Bound a step, in seconds, by all samples at their cheapest degrees, spread evenly, in fewest micro-batches."""
    work = _least_work(problem, ways or ways_of(problem), float("inf"))
    return problem.fewest_micro_batches * min(problem.fixed_s) + float(work.sum()) / speed_of_all(problem)


def longest_bound(problem: Problem, ways: Sequence[Way] | None = None) -> float:
    """Bound a step, in seconds, by its longest sample alone, at its fastest degree."""
    return min(_alone(problem, ways or ways_of(problem), problem.lengths[0]))


def duration_bound(problem: Problem, ways: Sequence[Way] | None = None) -> float:
    """Bound a step, in seconds, by its area, given how long the longest micro-batch lasts, at the best such duration.

    Let it last `t`. It holds the longest sample, and tokens for at most the memory of all ranks; the work of the others
    is done elsewhere. And no sample can be at a degree at which it alone takes longer than `t`, so that all the work is
    what it is at `t`. Between two of the durations tried, `t` is rounded down and the degrees are those of the upper.
    """
    ways = ways or ways_of(problem)
    durations, speed = _durations(problem, ways), speed_of_all(problem)
    fixed_s = min(problem.fixed_s)
    others_s = (problem.fewest_micro_batches - 1) * fixed_s
    area_s = area_bound(problem, ways)
    bounds: list[float] = []
    for shortest_s, next_s in zip(durations, [*durations[1:], float("inf")], strict=True):
        work = _least_work(problem, ways, next_s)
        elsewhere = _without_longest_tokens(problem, work)
        spread_s = others_s + fixed_s + float(work.sum()) / speed
        bounds.append(max(shortest_s + others_s + elsewhere / speed, spread_s))
        if bounds[-1] <= area_s:
            break  # the least of them is no better than the area bound, whatever the others are
    return min(bounds)


def _alone(problem: Problem, ways: Sequence[Way], length: int) -> list[float]:
    """List the seconds of a group that holds one sample, in each way that holds it."""
    return [way.cost.seconds([length], way.degree) for way in ways if length <= problem.capacity * way.degree]


def _durations(problem: Problem, ways: Sequence[Way]) -> list[float]:
    """List where the choice of degrees changes, ascending: what long samples take alone; a few of them, if many.

    Any but the first may be left out: `duration_bound` rounds down between those that stay, and is only weaker.
    """
    fastest_s = longest_bound(problem, ways)
    alone = {fastest_s}
    for length in problem.lengths:
        seconds = _alone(problem, ways, length)
        if max(seconds) <= fastest_s:
            break  # shorter samples have every degree
        alone.update(seconds)
    later = sorted(seconds for seconds in alone if seconds > fastest_s)
    step = -(-len(later) // MOST_DURATIONS) or 1
    return [fastest_s, *later[::step]]


def _least_work(problem: Problem, ways: Sequence[Way], below_s: float) -> Floats:
    """Return the rank-seconds of each sample at the cheapest degree that holds it in less time than this, or inf."""
    lengths = np.array(problem.lengths, dtype=np.float64)
    cheapest = np.full(len(lengths), np.inf)
    for degree, cost, share in ways:
        work = (cost.attention_s_per_token2 * lengths + cost.linear_s(degree)) * lengths
        # a hair more time than asked for: rounding may let in a degree, which lowers the bound, but never shut one out
        within = cost.fixed_s(degree) + work / degree < below_s * (1 + 1e-9)
        usable = (lengths <= problem.capacity * degree) & within
        cheapest[usable] = np.minimum(cheapest[usable], work[usable] * share)
    return cheapest


def _without_longest_tokens(problem: Problem, work: Floats) -> float:
    """Return the rank-seconds that are left when one micro-batch is filled with the samples that cost most a token.

    These are the longest: a shorter sample has at least the same degrees, so that none of its tokens costs more.
    """
    tokens = np.array(problem.tokens_before, dtype=np.float64)
    filled = min(float(problem.num_ranks * problem.capacity), float(tokens[-1]))
    work_before = np.concatenate([[0.0], np.cumsum(work)])
    return max(0.0, float(work_before[-1] - np.interp(filled, tokens, work_before)))
