"""The integer program: the best plan of a small batch, and the proof that none is faster.

FlexSP's formulation (arXiv:2412.01523, eq. 6-10 and 17-22): groups that may or may not exist, counts of equal samples
in each, and the makespan of every micro-batch; here for all micro-batches at once. It starts from a plan, so that
running out of time costs nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from hf_hetero.planner.draft import Draft, DraftMicroBatch, draft_seconds, micro_batch_seconds
from hf_hetero.planner.improve.program import TOLERANCE, Backend, Program
from hf_hetero.planner.problem import Problem

MOST_WHOLE_VARIABLES = 1500
"""Counts of samples, at most, in a program for a whole batch. Half: ±0.0 %, bound +0.7 %; double: ±0.0 % (small)."""


@dataclass(frozen=True)
class Slot:
    """A group that the program may fill.

    Args:
        micro_batch: which micro-batch it is in.
        index: of its degree.
    """

    micro_batch: int
    index: int


def solved(problem: Problem, draft: Draft, time_limit_s: float, backend: Backend = "highs") -> tuple[Draft, float]:
    """The draft, or a faster one if the integer program finds it within this many wall seconds.

    Args:
        problem: a batch that is small enough (`solved_whole`).

    Returns:
        The faster draft, and seconds below which no plan can be.
    """
    slots = _all_slots(problem, _most_micro_batches(problem, draft))
    found, bound = _solve(problem, slots, _filled(problem, slots, draft), time_limit_s, backend)
    best = draft if found is None or draft_seconds(problem, found) >= draft_seconds(problem, draft) else found
    return best, min(bound * TOLERANCE, draft_seconds(problem, best))


def solved_whole(problem: Problem, draft: Draft) -> bool:
    """Whether the batch is small enough for a program that knows every plan faster than the draft."""
    num_slots = _most_micro_batches(problem, draft) * sum(problem.num_ranks // degree for degree in problem.degrees)
    return num_slots * len(set(problem.lengths)) <= MOST_WHOLE_VARIABLES


def _most_micro_batches(problem: Problem, draft: Draft) -> int:
    """As many micro-batches as a plan that is faster than the draft can have."""
    fixed_s, most = min(problem.fixed_s), len(problem.lengths)
    return min(most, int(draft_seconds(problem, draft) / fixed_s)) if fixed_s > 0 else most


def _all_slots(problem: Problem, num_micro_batches: int) -> list[Slot]:
    """Every group of every degree, in so many micro-batches."""
    return [
        Slot(micro_batch, index)
        for micro_batch in range(num_micro_batches)
        for index, degree in enumerate(problem.degrees)
        for _ in range(problem.num_ranks // degree)
    ]


def _filled(problem: Problem, slots: list[Slot], draft: Draft) -> list[list[int]]:
    """The samples that each slot holds in a draft: slow micro-batches and groups come first in both."""
    slowest_first = sorted(draft, key=lambda groups: -micro_batch_seconds(problem, groups))
    waiting = {
        (number, problem.degrees.index(degree)): [samples for d, samples in groups if d == degree]
        for number, groups in enumerate(slowest_first)
        for degree, _ in groups
    }
    return [waiting[key].pop() if waiting.get(key := (slot.micro_batch, slot.index)) else [] for slot in slots]


def _solve(
    problem: Problem, slots: list[Slot], held: list[list[int]], time_limit_s: float, backend: Backend
) -> tuple[Draft | None, float]:
    """The best way found to put the samples into the slots, or None, and a bound for all of them.

    Exact memory is checked afterwards.

    Args:
        held: the samples that each slot holds in the plan that is known.
    """
    program = Program(backend)
    lengths = sorted(set(problem.lengths), reverse=True)
    spans = {m: program.column(cost=1.0) for m in sorted({slot.micro_batch for slot in slots})}
    used = [program.column(upper=1.0, integer=True) for _ in slots]
    start: dict[int, float] = dict.fromkeys(spans.values(), 0.0)
    counts: list[dict[int, int]] = []
    for slot, exists, samples in zip(slots, used, held, strict=True):
        degree, fixed_s = problem.degrees[slot.index], problem.fixed_s[slot.index]
        room, span = problem.capacity * degree, spans[slot.micro_batch]
        count = {n: program.column(upper=room // n, integer=True) for n in lengths if n <= room}
        work = [(column, problem.cost.work(length, degree) / degree) for length, column in count.items()]
        tokens = [(column, length / problem.capacity) for length, column in count.items()]
        program.at_most([*tokens, (exists, -room / problem.capacity)], 0.0)
        program.at_most([*work, (exists, fixed_s), (span, -1.0)], 0.0)
        counts.append(count)
        now = Counter(problem.lengths[sample] for sample in samples)
        start |= {exists: float(bool(samples))} | {count[n]: float(num) for n, num in now.items()}
        start[span] = max(start[span], problem.group_seconds(degree, samples) if samples else 0.0)
    for length, num in Counter(problem.lengths).items():
        program.equal([(count[length], 1.0) for count in counts if length in count], float(num))
    _add_choice_of_groups(problem, slots, program, spans, used)
    answer = program.solve(time_limit_s, start)
    if answer.values is None:
        return None, answer.bound
    found = [{n: round(answer.values[column]) for n, column in count.items()} for count in counts]
    return _read(problem, slots, found), answer.bound


def _add_choice_of_groups(
    problem: Problem, slots: list[Slot], program: Program, spans: dict[int, int], used: list[int]
) -> None:
    """The groups of a micro-batch share its ranks; of the orders of like groups and micro-batches, keep only one."""
    for m in spans:
        ranks = [
            (column, float(problem.degrees[slot.index]))
            for slot, column in zip(slots, used, strict=True)
            if slot.micro_batch == m
        ]
        program.at_most(ranks, float(problem.num_ranks))
    for first, second in pairwise(spans):
        program.at_most([(spans[second], 1.0), (spans[first], -1.0)], 0.0)
    for first, second in pairwise(range(len(slots))):
        if slots[first] == slots[second]:
            program.at_most([(used[second], 1.0), (used[first], -1.0)], 0.0)


def _read(problem: Problem, slots: list[Slot], counts: list[dict[int, int]]) -> Draft | None:
    """The counts as groups of each micro-batch, or None where tolerances lost a sample or a token of memory."""
    waiting: dict[int, list[int]] = {}
    for sample, length in enumerate(problem.lengths):
        waiting.setdefault(length, []).append(sample)
    draft: dict[int, DraftMicroBatch] = {}
    for slot, count in zip(slots, counts, strict=True):
        samples, degree = list[int](), problem.degrees[slot.index]
        for length, num in count.items():
            if num > len(waiting[length]):
                return None
            samples += [waiting[length].pop() for _ in range(num)]
        if sum(problem.lengths[sample] for sample in samples) > problem.capacity * degree:
            return None
        if samples:
            draft.setdefault(slot.micro_batch, []).append((degree, sorted(samples)))
    lost = any(waiting.values())
    crowded = any(sum(degree for degree, _ in groups) > problem.num_ranks for groups in draft.values())
    return None if lost or crowded else list(draft.values())
