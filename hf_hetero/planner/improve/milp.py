"""The integer program: better plans, given time.

FlexSP's formulation (arXiv:2412.01523, eq. 6-10 and 17-22): groups that may or may not exist, counts of equal samples
in each, and the makespan of every micro-batch; here for all micro-batches at once. A small batch is solved whole. In a
large one, two micro-batches at a time are solved again for a few of their samples (large neighbourhood search, P. Shaw,
1998). Either way it starts from a plan, so that running out of time costs nothing.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from itertools import combinations, pairwise

from hf_hetero.planner.draft import Draft, DraftMicroBatch, draft_seconds, micro_batch_seconds
from hf_hetero.planner.improve.program import TOLERANCE, Backend, Program
from hf_hetero.planner.problem import Problem

MOST_WHOLE_VARIABLES = 1500
"""Counts of samples, at most, in a program for a whole batch. Half: ±0.0 %, bound +0.7 %; double: ±0.0 % (small)."""
MOST_FREE_SAMPLES = 24
"""Samples, about, that groups give up in one neighbourhood. Half: ±0.0 %; double: ±0.0 % (improved)."""
MOST_FREE_GROUPS = 12
"""Groups, at most, that give up samples: half of them the slowest, half those with most time to spare. Half: ±0.0 %;
double: ±0.0 % (improved)."""
SECONDS_A_NEIGHBOURHOOD = 0.5
"""Wall seconds, at most, for one pair of micro-batches. Half: ±0.0 %; double: ±0.0 % (improved)."""
GAIN = 1e-6
"""Progress is what gains more than this share of the step; less is the solver's rounding. Half: ±0.0 %; double: ±0.0
% (improved)."""


@dataclass(frozen=True)
class Slot:
    """A group that the program may fill.

    Args:
        micro_batch: which micro-batch it is in.
        index: of its degree.
        kept: samples that stay in it.
        optional: whether it may be left out.
    """

    micro_batch: int
    index: int
    kept: tuple[int, ...] = ()
    optional: bool = True


@dataclass(frozen=True)
class Task:
    """What the program decides.

    Args:
        slots: groups that may be filled.
        free: samples to be put into them.
        least: seconds that a micro-batch takes anyway.
        held: the free samples that each slot holds in the plan that is known.
        is_whole: whether every faster plan is among its solutions, so that its bound holds for all plans.
    """

    slots: list[Slot]
    free: list[int]
    least: dict[int, float]
    held: list[list[int]]
    is_whole: bool = False


def improved(problem: Problem, draft: Draft, time_limit_s: float, backend: Backend = "highs") -> tuple[Draft, float]:
    """The draft, or a faster one if the integer program finds it within this many wall seconds.

    Returns:
        The faster draft, and seconds below which no plan can be; -inf where the batch was too large to be solved whole.
    """
    deadline = time.perf_counter() + time_limit_s
    num_micro_batches = _most_micro_batches(problem, draft)
    if solved_whole(problem, draft):
        slots = _all_slots(problem, num_micro_batches)
        task = Task(slots, list(range(len(problem.lengths))), {}, _filled(problem, slots, draft), is_whole=True)
        found, bound = _solve(problem, task, time_limit_s, backend)
        best = draft if found is None else _better(problem, draft, list(found.values()))
        return best, min(bound * TOLERANCE, draft_seconds(problem, best))
    best = draft
    progress = True
    while progress:
        progress = False
        for pair in combinations(range(len(best)), min(2, len(best))):
            left_s = deadline - time.perf_counter()
            if left_s <= 0:
                return best, -math.inf
            found = _resolved(problem, best, pair, min(left_s, SECONDS_A_NEIGHBOURHOOD), backend)
            if draft_seconds(problem, found) < draft_seconds(problem, best) * (1 - GAIN):
                is_shorter, best, progress = len(found) < len(best), found, True
                if is_shorter:  # the pairs that are left number micro-batches of which one is no more
                    break
    return best, -math.inf


def solved_whole(problem: Problem, draft: Draft) -> bool:
    """Whether the batch is small enough for a program that knows every plan faster than the draft."""
    num_slots = _most_micro_batches(problem, draft) * sum(problem.num_ranks // degree for degree in problem.degrees)
    return num_slots * len(set(problem.lengths)) <= MOST_WHOLE_VARIABLES


def _better(problem: Problem, draft: Draft, found: Draft) -> Draft:
    """The faster of two drafts."""
    return found if draft_seconds(problem, found) < draft_seconds(problem, draft) else draft


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


def _resolved(problem: Problem, draft: Draft, pair: tuple[int, ...], time_limit_s: float, backend: Backend) -> Draft:
    """The draft with some samples of two micro-batches in other groups of theirs.

    The slowest groups and those with most time to spare give up their longest samples; the other groups stay.
    """
    spans = {chosen: micro_batch_seconds(problem, draft[chosen]) for chosen in pair}

    def slack_s(group: tuple[int, int, list[int]]) -> float:
        return spans[group[0]] - problem.group_seconds(group[1], group[2])

    groups = [(chosen, degree, samples) for chosen in pair for degree, samples in draft[chosen]]
    ranked = sorted(groups, key=lambda group: (slack_s(group), group))
    half = MOST_FREE_GROUPS // 2
    eased, fixed = (ranked, []) if len(ranked) <= 2 * half else (ranked[:half] + ranked[-half:], ranked[half:-half])
    each = max(1, MOST_FREE_SAMPLES // len(eased))
    slots = [
        Slot(chosen, problem.degrees.index(degree), tuple(samples[each:]), optional=False)
        for chosen, degree, samples in eased
    ]
    given_up = [samples[:each] for _, _, samples in eased]
    least: dict[int, float] = {}
    for group in fixed:
        least[group[0]] = max(least.get(group[0], 0.0), spans[group[0]] - slack_s(group))
    task = Task(slots, sorted(sample for samples in given_up for sample in samples), least, given_up)
    found, _ = _solve(problem, task, time_limit_s, backend)
    if found is None:
        return draft
    changed = [groups for number, groups in enumerate(draft) if number not in pair]
    for chosen in pair:
        kept = [(degree, samples) for number, degree, samples in fixed if number == chosen]
        changed.append(kept + found.get(chosen, []))
    return _better(problem, draft, [groups for groups in changed if groups])


def _solve(
    problem: Problem, task: Task, time_limit_s: float, backend: Backend
) -> tuple[dict[int, DraftMicroBatch] | None, float]:
    """The best way found to put the free samples into the slots, or None, and a bound for all of them.

    Exact memory is checked afterwards.
    """
    program, slots = Program(backend, claims=task.is_whole), task.slots
    lengths = sorted({problem.lengths[sample] for sample in task.free}, reverse=True)
    numbers = sorted({slot.micro_batch for slot in slots} | set(task.least))
    spans = {m: program.column(cost=1.0, lower=task.least.get(m, 0.0)) for m in numbers}
    used = [program.column(lower=0.0 if slot.optional else 1.0, upper=1.0, integer=True) for slot in slots]
    start: dict[int, float] = dict.fromkeys(spans.values(), 0.0)
    counts: list[dict[int, int]] = []
    for slot, exists, held in zip(slots, used, task.held, strict=True):
        degree, fixed_s = problem.degrees[slot.index], problem.fixed_s[slot.index]
        room = problem.capacity * degree - sum(problem.lengths[sample] for sample in slot.kept)
        kept_s = problem.group_seconds(degree, slot.kept) - fixed_s
        count = {n: program.column(upper=room // n, integer=True) for n in lengths if n <= room}
        work = [(column, problem.cost.work(length, degree) / degree) for length, column in count.items()]
        tokens = [(column, length / problem.capacity) for length, column in count.items()]
        program.at_most([*tokens, (exists, -room / problem.capacity)], 0.0)
        program.at_most([*work, (exists, fixed_s), (spans[slot.micro_batch], -1.0)], -kept_s)
        counts.append(count)
        now = Counter(problem.lengths[sample] for sample in held)
        start |= {exists: float(bool(held or not slot.optional))} | {count[n]: float(num) for n, num in now.items()}
        seconds = problem.group_seconds(degree, [*slot.kept, *held]) if held or slot.kept else 0.0
        start[spans[slot.micro_batch]] = max(
            start[spans[slot.micro_batch]], seconds, task.least.get(slot.micro_batch, 0.0)
        )
    for length, num in Counter(problem.lengths[sample] for sample in task.free).items():
        program.equal([(count[length], 1.0) for count in counts if length in count], float(num))
    if all(slot.optional for slot in slots):
        _add_choice_of_groups(problem, slots, program, spans, used)
    answer = program.solve(time_limit_s, start)
    if answer.values is None:
        return None, answer.bound
    found = [{n: round(answer.values[column]) for n, column in count.items()} for count in counts]
    return _read(problem, slots, task.free, found), answer.bound


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


def _read(
    problem: Problem, slots: list[Slot], free: list[int], counts: list[dict[int, int]]
) -> dict[int, DraftMicroBatch] | None:
    """The counts as groups of each micro-batch, or None where tolerances lost a sample or a token of memory."""
    waiting: dict[int, list[int]] = {}
    for sample in free:
        waiting.setdefault(problem.lengths[sample], []).append(sample)
    draft: dict[int, DraftMicroBatch] = {}
    for slot, count in zip(slots, counts, strict=True):
        samples, degree = list(slot.kept), problem.degrees[slot.index]
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
    return None if lost or crowded else draft
