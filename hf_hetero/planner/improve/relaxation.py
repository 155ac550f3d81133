"""A tight certified bound, given time: a program that every plan satisfies, though not every solution is a plan.

Micro-batches are counted by class of duration and groups by class and degree. Samples flow into them as fractions; the
longest are whole, the others are taken together by length, with the tokens they have and the least attention they can
cost. Rows for one long sample ("where it is, there is a group of its degree, which lasts as long as it does") are the
reformulation-linearisation of Sherali and Adams (SIAM J. Discrete Math. 3, 1990). What ties samples to groups of one
class is in `group_rows`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hf_hetero.planner.bound import area_bound, longest_bound
from hf_hetero.planner.improve.group_rows import Flow, Kind, add_groups
from hf_hetero.planner.improve.program import TOLERANCE, Backend, Program
from hf_hetero.planner.problem import Problem

NUM_CLASSES = 8
"""Classes of durations in the first program of a branch; those in use are halved later. Half: ±0.0 %, bound +0.6 %;
double: -0.1 % (-0.3 to 0) (improved)."""
NUM_CLASSES_GIVEN_TIME = 18
"""The same where there is `LONG_S` or more: the first program takes longer, and its bound is closer."""
LONG_S = 15.0
"""Wall seconds from which on there are more classes of durations."""
NUM_KINDS = (30, 45, 60)
"""Kinds of samples in the first program of a branch, in the second, and in the later ones. Half: +0.1 % (0 to +0.3),
bound +0.6 %; double: +0.1 % (0 to +0.3) (improved)."""
NARROWEST, LEAST_SHARE = 1.002, 1e-4
"""A class of durations is halved while its ends are further apart than this ratio, and than this share of the step.
Narrower ones say no more, and a solver takes differences below 1e-9 for none. Half and double: no change (improved)."""
LONGEST_LADDER = 200
"""The ladder of classes starts at the longest possible duration over this, or at the shortest. Half: ±0.0 %; double:
-0.1 % (-0.3 to 0) (improved)."""


@dataclass(slots=True)
class Branch:
    """Some of the plans: those with as few micro-batches as memory asks for, or those with more.

    The more micro-batches there are, the shorter is the longest, so that one program for both would be weaker.

    Args:
        exact: the fewest micro-batches; else at least one more.
        edges: ends of the classes of durations, ascending, in seconds.
        bound: seconds below which none of these plans is.
        rounds: programs that were solved.
        final: whether another program would say no more.
    """

    exact: bool
    edges: list[float]
    bound: float
    rounds: int = 0
    final: bool = False


def relaxed_bound(problem: Problem, upper_s: float, time_limit_s: float, backend: Backend = "highs") -> float:
    """Seconds below which no plan can be; the area bound where the limit is too short for more.

    The branch with the lowest bound is solved again and again, each time with the classes halved that its solution
    used: a class counts as short as its shortest duration where that is cheaper, and as long as its longest where more
    samples fit into that.

    Args:
        upper_s: seconds of a known plan; the bound is at most that.
        time_limit_s: wall seconds for all programs together.
    """
    deadline = time.perf_counter() + time_limit_s
    branches = _branches(problem, upper_s, NUM_CLASSES if time_limit_s < LONG_S else NUM_CLASSES_GIVEN_TIME)
    while branches:
        branch = min(branches, key=lambda branch: branch.bound)
        left_s = deadline - time.perf_counter()
        if left_s <= 0 or branch.final or branch.bound >= upper_s * TOLERANCE:
            break
        waiting = sum(other.rounds == 0 for other in branches if other is not branch)
        _tighten(problem, branch, upper_s, left_s / (1 + waiting), backend)
    return min([upper_s, *(branch.bound for branch in branches)]) * TOLERANCE


def _branches(problem: Problem, upper_s: float, num_classes: int) -> list[Branch]:
    """All branches that may hold a plan as fast as this."""
    branches: list[Branch] = []
    for exact in (True, False):
        shortest_s, longest_s = _ends(problem, upper_s, exact)
        if shortest_s < longest_s:
            bound = area_bound(problem) + (0.0 if exact else min(problem.fixed_s))
            branches.append(Branch(exact, _edges(problem, shortest_s, longest_s, num_classes), bound))
    return branches


def _tighten(problem: Problem, branch: Branch, upper_s: float, time_limit_s: float, backend: Backend) -> None:
    """Raise the bound of a branch, and halve the classes that its solution used."""
    kinds = _kinds(problem, NUM_KINDS[min(branch.rounds, len(NUM_KINDS) - 1)])
    program, counts = _program(problem, kinds, branch, upper_s, backend)
    answer = program.solve(time_limit_s)
    branch.bound, branch.rounds = max(branch.bound, answer.bound), branch.rounds + 1
    if answer.values is None:
        return  # there is no such plan, or no time to find one
    halves: list[float] = []
    for count, (low_s, high_s) in zip(counts, pairwise(branch.edges), strict=True):
        if answer.values[count] > 0.5 and high_s > low_s * NARROWEST and high_s - low_s > LEAST_SHARE * upper_s:
            halves.append((low_s + high_s) / 2)
    branch.edges = sorted([*branch.edges, *halves])
    branch.final = not halves and branch.rounds >= len(NUM_KINDS)


def _program(
    problem: Problem, kinds: list[Kind], branch: Branch, below_s: float, backend: Backend
) -> tuple[Program, list[int]]:
    """All plans of a branch that are no slower than this, and the columns that count micro-batches by class."""
    program = Program(backend)
    shares: dict[int, list[int]] = defaultdict(list)
    counts: list[int] = []
    seconds: list[tuple[int, float]] = []
    capacity_left: list[tuple[int, float]] = []
    for low_s, high_s in pairwise(branch.edges):
        count, total_s = program.column(integer=True), program.column(cost=1.0)
        program.at_most([(count, low_s), (total_s, -1.0)], 0.0)
        program.at_most([(total_s, 1.0), (count, -high_s)], 0.0)
        flows = _flows(problem, program, kinds, high_s)
        for flow in flows:
            shares[flow.kind].append(flow.column)
        capacity_left += add_groups(problem, program, kinds, flows, (low_s, high_s), (count, total_s))
        _add_longest(program, kinds, flows, low_s, (count, total_s))
        counts.append(count)
        seconds.append((total_s, 1.0))
    for columns in shares.values():
        program.equal([(column, 1.0) for column in columns], 1.0)
    program.at_most(capacity_left, -_hidden_work(problem, kinds))
    program.at_most(seconds, below_s)
    if branch.exact:
        program.equal([(count, 1.0) for count in counts], float(problem.fewest_micro_batches))
    else:
        program.at_most([(count, -1.0) for count in counts], -float(problem.fewest_micro_batches + 1))
    return program, counts


def _kinds(problem: Problem, most: int) -> list[Kind]:
    """The longest samples alone, the others in runs of about equal tokens; at most so many."""
    lengths = problem.lengths
    num_alone = min(len(lengths), most // 2 if len(lengths) > most else most)
    tokens = np.array(problem.tokens_before, dtype=np.float64)
    marks = np.linspace(tokens[num_alone], tokens[-1], most - num_alone + 1)
    cuts = sorted({*range(num_alone + 1), *np.searchsorted(tokens, marks).tolist(), len(lengths)})
    return [
        Kind(lengths[end - 1], lengths[start], end - start, sum(lengths[start:end])) for start, end in pairwise(cuts)
    ]


def _hidden_work(problem: Problem, kinds: list[Kind]) -> float:
    """Rank-seconds of attention that is left out where a kind's samples count as long as its shortest."""
    squares = sum(length * length for length in problem.lengths)
    counted = sum(kind.shortest * kind.num_tokens for kind in kinds)
    return problem.cost.attention_s_per_token2 * max(0, squares - counted)


def _ends(problem: Problem, below_s: float, exact: bool) -> tuple[float, float]:
    """Seconds of the shortest and of the longest micro-batch that a plan as fast as this can have.

    Where there are no more micro-batches than memory asks for, each holds at least what does not fit into the others.
    """
    fixed_s, others = min(problem.fixed_s), problem.fewest_micro_batches - exact
    shortest_s = fixed_s
    if exact:
        left_over = problem.num_tokens - others * problem.num_ranks * problem.capacity
        shortest_s += min(problem.linear_s) * left_over / problem.num_ranks
    return shortest_s, below_s - others * shortest_s


def _edges(problem: Problem, shortest_s: float, longest_s: float, num_classes: int) -> list[float]:
    """Ends of the classes of durations, ascending: a ladder, and what the longest sample takes at best."""
    ladder = np.geomspace(max(shortest_s, longest_s / LONGEST_LADDER), longest_s, num_classes + 1)[1:-1].tolist()
    alone_s = longest_bound(problem)
    inner = {*ladder, alone_s} if shortest_s < alone_s < longest_s else set(ladder)
    return [shortest_s, *sorted(inner), longest_s]


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


def _add_longest(
    program: Program, kinds: list[Kind], flows: list[Flow], low_s: float, micro_batches: tuple[int, int]
) -> None:
    """A sample that is alone in its kind is in one micro-batch, which lasts at least as long as the sample does."""
    count, total_s = micro_batches
    for number, kind in enumerate(kinds):
        of_kind = [flow for flow in flows if flow.kind == number]
        if kind.num_samples == 1 and of_kind:
            program.at_most([*((flow.column, 1.0) for flow in of_kind), (count, -1.0)], 0.0)
            longer = [(flow.column, flow.alone_s - low_s) for flow in of_kind if flow.alone_s > low_s]
            if longer:
                program.at_most([*longer, (total_s, -1.0), (count, low_s)], 0.0)
