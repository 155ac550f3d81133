"""The groups of one class of durations, as rows of the relaxation: their ranks, memory and time.

Rows for samples of which few fit into one group use the dual feasible functions of Fekete and Schepers (Math. Program.
91, 2001).
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_hetero.planner.improve.program import Program
from hf_hetero.planner.problem import Problem

MOST_WHOLE = 8
"""Groups of which at most so many fit on the ranks come in whole numbers; of more, a fraction changes little. Half:
±0.0 %; double: ±0.0 % (improved)."""
DUAL_FEASIBLE = (1, 2, 3)
"""Rows for samples of which at most 1, 2 or 3 fit into a group; a batch has few that a fourth row would tell apart."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Samples of about one length.

    Args:
        shortest, longest: tokens of the samples at the ends.
        num_samples: how many; a single one is never divided.
        num_tokens: of all of them.
    """

    shortest: int
    longest: int
    num_samples: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Flow:
    """A column: the share of a kind that goes to groups of one degree in one class.

    Args:
        kind: number of the kind.
        index: of the degree.
        column: in the program.
        alone_s: seconds of the kind's shortest sample alone.
        work_s: least seconds that the whole kind adds to one such group.
    """

    kind: int
    index: int
    column: int
    alone_s: float
    work_s: float


def add_groups(
    problem: Problem,
    program: Program,
    kinds: list[Kind],
    flows: list[Flow],
    ends_s: tuple[float, float],
    micro_batches: tuple[int, int],
) -> list[tuple[int, float]]:
    """The groups of one class: their ranks, memory and time.

    Groups of one degree last `low_s` each, and together `beyond` longer, as long as their micro-batches do. That the
    micro-batches of the class give so much and no more is what ties the groups to them.

    Args:
        ends_s: shortest and longest duration of the class.
        micro_batches: columns of their number and of their seconds.

    Returns:
        Terms of the rank-seconds used less those there are.
    """
    (low_s, high_s), (count, total_s) = ends_s, micro_batches
    ranks: list[tuple[int, float]] = [(count, -float(problem.num_ranks))]
    rank_s: list[tuple[int, float]] = [(total_s, -float(problem.num_ranks)), (count, low_s * problem.num_ranks)]
    capacity_left: list[tuple[int, float]] = []
    for index, degree in enumerate(problem.degrees):
        of_degree = [flow for flow in flows if flow.index == index]
        if not of_degree:
            continue
        most, busy_s = float(problem.num_ranks // degree), low_s - problem.fixed_s[index]
        groups, beyond = program.column(integer=most <= MOST_WHOLE), program.column()
        program.at_most([(groups, 1.0), (count, -most)], 0.0)
        program.at_most([(beyond, 1.0), (groups, low_s - high_s)], 0.0)
        program.at_most([(beyond, 1.0), (total_s, -most), (count, most * low_s)], 0.0)
        work = [(flow.column, flow.work_s) for flow in of_degree]
        program.at_most([*work, (groups, -busy_s), (beyond, -1.0)], 0.0)
        tokens = [(flow.column, kinds[flow.kind].num_tokens / (degree * problem.capacity)) for flow in of_degree]
        program.at_most([*tokens, (groups, -1.0)], 0.0)
        _add_crowding(program, kinds, of_degree, groups, degree * problem.capacity)
        _add_waste(problem, program, kinds, of_degree, ends_s, groups, beyond)
        for flow in of_degree:
            if kinds[flow.kind].num_samples == 1:
                program.at_most([(flow.column, 1.0), (groups, -1.0)], 0.0)
                if flow.alone_s > low_s:
                    program.at_most([(flow.column, flow.alone_s - low_s), (beyond, -1.0)], 0.0)
        ranks.append((groups, float(degree)))
        rank_s.append((beyond, float(degree)))
        capacity_left += [(column, degree * seconds) for column, seconds in work]
        capacity_left += [(groups, -degree * busy_s), (beyond, -float(degree))]
    program.at_most(ranks, 0.0)
    program.at_most(rank_s, 0.0)
    return capacity_left


def _add_crowding(program: Program, kinds: list[Kind], flows: list[Flow], groups: int, room: int) -> None:
    """Of samples above a half (a third, a quarter) of a group's memory, a group holds at most one (two, three)."""
    for share in DUAL_FEASIBLE:
        terms: list[tuple[int, float]] = []
        for flow in flows:
            kind = kinds[flow.kind]
            scaled, rest = divmod(kind.shortest * (share + 1), room)
            each = kind.shortest / room if rest == 0 else scaled / share
            # a share of the tokens is at least this share of the number, if all samples were as long as the longest
            fewest = kind.num_tokens / kind.longest
            if each > 0:
                terms.append((flow.column, each * fewest))
        if terms:
            program.at_most([*terms, (groups, -1.0)], 0.0)


def _add_waste(
    problem: Problem,
    program: Program,
    kinds: list[Kind],
    flows: list[Flow],
    ends_s: tuple[float, float],
    groups: int,
    beyond: int,
) -> None:
    """Memory that a group cannot fill in time, because long samples in it take longer than their tokens alone would.

    In a group that has time for `spare` tokens more than it has memory for, a sample whose attention takes as long as
    `slow` tokens leaves at least `slow - spare` tokens of memory empty; so do several, each on its own account, because
    what is beyond `spare` is superadditive.
    """
    degree, linear_s = problem.degrees[flows[0].index], problem.linear_s[flows[0].index]
    room = degree * problem.capacity
    if linear_s <= 0:
        return
    for low in (True, False):
        spare = degree * (ends_s[0 if low else 1] - problem.fixed_s[flows[0].index]) / linear_s - room
        if spare < 0:
            continue  # there, time is all that counts
        terms: list[tuple[int, float]] = []
        for flow in flows:
            kind = kinds[flow.kind]
            empty = problem.cost.attention_s_per_token2 * kind.shortest**2 / linear_s - spare
            tokens = kind.num_tokens + max(0.0, empty) * kind.num_tokens / kind.longest
            terms.append((flow.column, tokens / room))
        later = [(beyond, -degree / (linear_s * room))] if low else []
        program.at_most([*terms, *later, (groups, -1.0)], 0.0)
