"""Certified lower bounds: no plan of a batch is faster."""

from __future__ import annotations

from hf_hetero.planner.problem import Problem


def lower_bound(problem: Problem) -> float:
    """Seconds below which no plan of this batch can be."""
    if not problem.lengths:
        return 0.0
    return max(area_bound(problem), longest_bound(problem))


def area_bound(problem: Problem) -> float:
    """Every sample at its cheapest degree, spread evenly, with as few micro-batches as memory allows; in seconds."""
    area, first = 0.0, 0
    lengths, degrees = problem.lengths, problem.degrees
    for length in lengths:
        while first < len(degrees) and length <= problem.capacity * degrees[-1 - first]:
            first += 1
        usable = range(len(degrees) - first, len(degrees))
        area += _cheapest(problem, length, usable)
    return problem.fewest_micro_batches * problem.cost.micro_batch_s + area / problem.num_ranks


def _cheapest(problem: Problem, length: int, usable: range) -> float:
    return problem.cost.attention_s_per_token2 * length * length + min(problem.linear_s[x] for x in usable) * length


def longest_bound(problem: Problem) -> float:
    """The longest sample alone, at its fastest degree; in seconds."""
    longest = problem.lengths[0]
    return min(problem.cost.seconds([longest], d) for d in problem.degrees if longest <= problem.capacity * d)
