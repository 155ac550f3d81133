"""This module finds the best plan with one degree, as a static run has it, so that no plan is worse than static."""

from __future__ import annotations

from bisect import bisect_left, insort

from hf_hetero.planner.draft import Draft, DraftGroup, draft_seconds, tiling
from hf_hetero.planner.problem import Problem


def best_homogeneous(problem: Problem, below_s: float = float("inf")) -> Draft | None:
    """Find the fastest plan whose groups all have one degree (FlexSP's "BatchAda", arXiv:2412.01523, section 6.1).

    Where the degree does not divide the ranks, the ranks left over form smaller groups.

    Args:
        below_s: a plan is of interest only when it takes fewer seconds; degrees that cannot are left aside.

    Returns:
        The plan, or None where none is below.
    """
    best: Draft | None = None
    for index, degree in enumerate(problem.degrees):
        if problem.capacity * degree >= problem.lengths[0] and _least_seconds(problem, index) < below_s:
            draft = homogeneous(problem, degree)
            if draft is not None and (seconds := draft_seconds(problem, draft)) < below_s:
                best, below_s = draft, seconds
    return best


def homogeneous(problem: Problem, degree: int) -> Draft | None:
    """Return the faster of two packings with groups of this degree; None where it does not hold the longest sample."""
    if degree not in problem.degrees or problem.capacity * degree < problem.lengths[0]:
        return None
    return min((_best_fit(problem, degree), _balanced(problem, degree)), key=lambda d: draft_seconds(problem, d))


def _least_seconds(problem: Problem, index: int) -> float:
    """Return seconds that no plan with groups of this degree, or smaller ones in the ranks left over, undercuts."""
    linear_s = min(problem.linear_s[: index + 1])
    fixed_s = min(problem.fixed_s[: index + 1])
    if problem.num_ranks % problem.degrees[index] == 0:  # then no ranks are left over for smaller groups
        linear_s, fixed_s = problem.linear_s[index], problem.fixed_s[index]
    squares = sum(length * length for length in problem.lengths)
    work = problem.cost.attention_s_per_token2 * squares + linear_s * problem.num_tokens
    return (problem.fewest_micro_batches * fixed_s + work / problem.num_ranks) * (1 - 1e-9)


def _best_fit(problem: Problem, degree: int) -> Draft:
    """Pack best-fit decreasing into groups of this degree; the slowest groups run together."""
    tiles = tiling(problem.num_ranks, degree, problem.degrees)
    groups: list[DraftGroup] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, group), ascending
    for sample, length in enumerate(problem.lengths):
        tightest = bisect_left(rooms, (length, -1))
        while tightest == len(rooms):  # a group of the ranks left over may be too small: open the next
            opened = tiles[len(groups) % len(tiles)]
            insort(rooms, (problem.capacity * opened, len(groups)))
            groups.append((opened, []))
            tightest = bisect_left(rooms, (length, -1))
        room, group = rooms.pop(tightest)
        groups[group][1].append(sample)
        insort(rooms, (room - length, group))
    return _stack(problem, groups)


def _balanced(problem: Problem, degree: int) -> Draft:
    """Put samples, longest first, onto the group that would end earliest, in as few micro-batches as hold them."""
    tiles = tiling(problem.num_ranks, degree, problem.degrees)
    if len(set(tiles)) > 1:  # groups of unlike degrees are not compared by their loads
        return _best_fit(problem, degree)
    num_micro_batches = problem.fewest_micro_batches
    while True:
        rooms = [problem.capacity * degree] * (len(tiles) * num_micro_batches)
        groups = _longest_first(problem, degree, rooms)
        if groups is not None:
            return _stack(problem, groups)
        num_micro_batches += 1 + num_micro_batches // 8  # by more where there are many, so that tries stay few


def _longest_first(problem: Problem, degree: int, rooms: list[int]) -> list[DraftGroup] | None:
    """Schedule longest processing time first (Graham, 1969), with memory; None where a sample finds no room."""
    loads: list[tuple[float, int]] = [(0.0, group) for group in range(len(rooms))]
    groups: list[DraftGroup] = [(degree, []) for _ in rooms]
    for sample, length in enumerate(problem.lengths):
        earliest = next((i for i, (_, group) in enumerate(loads) if rooms[group] >= length), None)
        if earliest is None:
            return None
        load, group = loads.pop(earliest)
        groups[group][1].append(sample)
        rooms[group] -= length
        insort(loads, (load + problem.cost.work(length, degree), group))
    return groups


def _stack(problem: Problem, groups: list[DraftGroup]) -> Draft:
    """Stack slow groups into the same micro-batches, each with as many groups of a degree as a tiling has."""
    largest = max(degree for degree, _ in groups)
    tiles = tiling(problem.num_ranks, largest, problem.degrees)
    draft: Draft = []
    for degree in sorted(set(tiles)):
        filled = [group for group in groups if group[0] == degree and group[1]]
        filled.sort(key=lambda group: -problem.group_seconds(degree, group[1]))
        width = tiles.count(degree)
        for number, start in enumerate(range(0, len(filled), width)):
            if number == len(draft):
                draft.append([])
            draft[number] += filled[start : start + width]
    return draft
