"""A tight certified bound, given time: a program that every plan satisfies, though not every solution is a plan.

Micro-batches are counted by class of duration and groups by class and degree. Samples flow into them as fractions; the
longest are whole, the others are taken together by length, with the tokens they have and the least attention they can
cost. Rows for one long sample ("where it is, there is a group of its degree, which lasts as long as it does") are the
reformulation-linearisation of Sherali and Adams (SIAM J. Discrete Math. 3, 1990); rows for samples of which few fit
into one group use the dual feasible functions of Fekete and Schepers (Math. Program. 91, 2001).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hf_hetero.planner.bound import longest_bound
from hf_hetero.planner.problem import Problem
from hf_hetero.planner.program import TOLERANCE, Backend, Program

NUM_CLASSES = 12
NUM_KINDS = 60
MOST_WHOLE = 8
"""Groups of which at most so many fit on the ranks come in whole numbers; of more, a fraction changes little."""
DUAL_FEASIBLE = (1, 2, 3)


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


def relaxed_bound(problem: Problem, upper_s: float, time_limit_s: float, backend: Backend = "highs") -> float:
    """Seconds below which no plan can be; -inf where the limit was too short.

    Args:
        upper_s: seconds of a known plan; faster plans have no longer micro-batch.
        time_limit_s: wall seconds for the solver.
    """
    kinds = _kinds(problem)
    edges = _edges(problem, upper_s)
    program = Program(backend)
    shares: dict[int, list[int]] = defaultdict(list)
    number: list[int] = []
    capacity_left: list[tuple[int, float]] = []
    for low_s, high_s in pairwise(edges):
        count, total_s = program.column(integer=True), program.column(cost=1.0)
        program.at_most([(count, low_s), (total_s, -1.0)], 0.0)
        program.at_most([(total_s, 1.0), (count, -high_s)], 0.0)
        flows = _flows(problem, program, kinds, high_s)
        for flow in flows:
            shares[flow.kind].append(flow.column)
        capacity_left += _add_groups(problem, program, kinds, flows, (low_s, high_s), (count, total_s))
        _add_longest(program, kinds, flows, low_s, (count, total_s))
        number.append(count)
    for columns in shares.values():
        program.equal([(column, 1.0) for column in columns], 1.0)
    program.at_most([(count, -1.0) for count in number], -float(problem.fewest_micro_batches))
    program.at_most(capacity_left, -_hidden_work(problem, kinds))
    bound = program.solve(time_limit_s).bound * TOLERANCE
    return min(bound, upper_s)


def _kinds(problem: Problem) -> list[Kind]:
    """The longest samples alone, the others in runs of about equal tokens; at most `NUM_KINDS`."""
    lengths = problem.lengths
    num_alone = min(len(lengths), NUM_KINDS // 2 if len(lengths) > NUM_KINDS else NUM_KINDS)
    tokens = np.array(problem.tokens_before, dtype=np.float64)
    marks = np.linspace(tokens[num_alone], tokens[-1], NUM_KINDS - num_alone + 1)
    cuts = sorted({*range(num_alone + 1), *np.searchsorted(tokens, marks).tolist(), len(lengths)})
    return [
        Kind(lengths[end - 1], lengths[start], end - start, sum(lengths[start:end])) for start, end in pairwise(cuts)
    ]


def _hidden_work(problem: Problem, kinds: list[Kind]) -> float:
    """Rank-seconds of attention that is left out where a kind's samples count as long as its shortest."""
    squares = sum(length * length for length in problem.lengths)
    counted = sum(kind.shortest * kind.num_tokens for kind in kinds)
    return problem.cost.attention_s_per_token2 * max(0, squares - counted)


def _edges(problem: Problem, upper_s: float) -> list[float]:
    """Ends of the classes of durations, ascending: a ladder, and what the longest sample takes at best."""
    fixed_s = min(problem.fixed_s)
    ladder = np.geomspace(max(fixed_s * 1.02, upper_s / 200), upper_s, NUM_CLASSES)
    inner = {float(edge) for edge in [*ladder[:-1], longest_bound(problem)] if fixed_s < edge < upper_s}
    return [fixed_s, *sorted(inner), upper_s]


def _flows(problem: Problem, program: Program, kinds: list[Kind], high_s: float) -> list[Flow]:
    """A column for each kind and each degree that can hold its shortest sample in a micro-batch of this duration."""
    attention, flows = problem.cost.attention_s_per_token2, list[Flow]()
    for number, kind in enumerate(kinds):
        for index, degree in enumerate(problem.degrees):
            alone_s = problem.cost.seconds([kind.shortest], degree)
            if kind.shortest <= problem.capacity * degree and alone_s <= high_s * (1 + 1e-9):
                work = (attention * kind.shortest + problem.linear_s[index]) * kind.num_tokens
                flows.append(Flow(number, index, program.column(upper=1.0), alone_s, work / degree))
    return flows


def _add_groups(
    problem: Problem,
    program: Program,
    kinds: list[Kind],
    flows: list[Flow],
    ends_s: tuple[float, float],
    micro_batches: tuple[int, int],
) -> list[tuple[int, float]]:
    """The groups of one class: their ranks, memory and time.

    Args:
        ends_s: shortest and longest duration of the class.
        micro_batches: columns of their number and of their seconds.

    Returns:
        Terms of the rank-seconds used less those there are.
    """
    count, total_s = micro_batches
    ranks: list[tuple[int, float]] = [(count, -1.0)]
    rank_s: list[tuple[int, float]] = [(total_s, -1.0)]
    capacity_left: list[tuple[int, float]] = []
    for index, degree in enumerate(problem.degrees):
        here = [flow for flow in flows if flow.index == index]
        if not here:
            continue
        most, fixed_s = problem.num_ranks // degree, problem.fixed_s[index]
        groups, group_s = program.column(integer=most <= MOST_WHOLE), program.column()
        work = [(flow.column, flow.work_s) for flow in here]
        program.at_most([*work, (group_s, -1.0), (groups, fixed_s)], 0.0)
        tokens = [(flow.column, kinds[flow.kind].num_tokens / (degree * problem.capacity)) for flow in here]
        program.at_most([*tokens, (groups, -1.0)], 0.0)
        program.at_most([(group_s, 1.0), (groups, -ends_s[1])], 0.0)
        program.at_most([(groups, 1.0), (count, -float(most))], 0.0)
        program.at_most([(group_s, 1.0), (total_s, -float(most))], 0.0)
        _add_crowding(program, kinds, here, groups, degree * problem.capacity)
        for flow in here:
            if kinds[flow.kind].num_samples == 1:
                program.at_most([(flow.column, 1.0), (groups, -1.0)], 0.0)
                longer_s = flow.alone_s - fixed_s
                program.at_most([(flow.column, longer_s), (group_s, -1.0), (groups, fixed_s)], 0.0)
        ranks.append((groups, degree / problem.num_ranks))
        rank_s.append((group_s, degree / problem.num_ranks))
        capacity_left += [(column, degree * seconds) for column, seconds in work]
        capacity_left += [(group_s, -float(degree)), (groups, degree * fixed_s)]
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


def _add_longest(
    program: Program, kinds: list[Kind], flows: list[Flow], low_s: float, micro_batches: tuple[int, int]
) -> None:
    """A sample that is alone in its kind is in one micro-batch, which lasts at least as long as the sample does."""
    count, total_s = micro_batches
    for number, kind in enumerate(kinds):
        here = [flow for flow in flows if flow.kind == number]
        if kind.num_samples == 1 and here:
            program.at_most([*((flow.column, 1.0) for flow in here), (count, -1.0)], 0.0)
            longer = [(flow.column, flow.alone_s - low_s) for flow in here if flow.alone_s > low_s]
            if longer:
                program.at_most([*longer, (total_s, -1.0), (count, low_s)], 0.0)
