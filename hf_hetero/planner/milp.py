"""The integer program: the one place that imports `mip`.

FlexSP's formulation (arXiv:2412.01523, eq. 6-10 and 17-22): groups that may or may not exist, counts of equal samples
in each, and the makespan of every micro-batch; here for all micro-batches at once. A small batch is solved whole. In a
large one, two micro-batches at a time are solved again for a few of their samples (large neighbourhood search, P. Shaw,
1998). Either way a plan exists before it starts, so that running out of time costs nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, cast

from hf_hetero.planner.draft import Draft, DraftMicroBatch, draft_seconds, micro_batch_seconds
from hf_hetero.planner.problem import Problem

MOST_WHOLE_VARIABLES = 1500
MOST_FREE_SAMPLES = 24
MOST_FREE_GROUPS = 12
SECONDS_A_NEIGHBOURHOOD = 0.5
GAIN = 1e-6


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


def improved(problem: Problem, draft: Draft, time_limit_s: float) -> Draft:
    """The draft, or a faster one if the integer program finds it within this many wall seconds."""
    deadline = time.perf_counter() + time_limit_s
    slots = _all_slots(problem, draft)
    if len(slots) * len(set(problem.lengths)) <= MOST_WHOLE_VARIABLES:
        samples = list(range(len(problem.lengths)))
        return _better(problem, draft, _solve(problem, slots, samples, draft_seconds(problem, draft), time_limit_s))
    best = draft
    progress = True
    while progress:
        progress = False
        for pair in combinations(range(len(best)), min(2, len(best))):
            left_s = deadline - time.perf_counter()
            if left_s <= 0:
                return best
            found = _resolved(problem, best, pair, min(left_s, SECONDS_A_NEIGHBOURHOOD))
            if draft_seconds(problem, found) < draft_seconds(problem, best) * (1 - GAIN):
                best, progress = found, True
    return best


def _better(problem: Problem, draft: Draft, found: Draft | None) -> Draft:
    """The faster of two drafts."""
    if found is None or draft_seconds(problem, found) >= draft_seconds(problem, draft):
        return draft
    return found


def _all_slots(problem: Problem, draft: Draft) -> list[Slot]:
    """Every group of every degree, in as many micro-batches as a plan that is faster than the draft can have."""
    fixed_s, most = min(problem.fixed_s), len(problem.lengths)
    if fixed_s > 0:
        most = min(most, int(draft_seconds(problem, draft) / fixed_s))
    return [
        Slot(micro_batch, index)
        for micro_batch in range(most)
        for index, degree in enumerate(problem.degrees)
        for _ in range(problem.num_ranks // degree)
    ]


def _resolved(problem: Problem, draft: Draft, pair: tuple[int, ...], time_limit_s: float) -> Draft:
    """The draft with some samples of two micro-batches in other groups of theirs."""
    groups = [(chosen, degree, samples) for chosen in pair for degree, samples in draft[chosen]]
    spans = {chosen: micro_batch_seconds(problem, draft[chosen]) for chosen in pair}

    def slack_s(group: tuple[int, int, list[int]]) -> float:
        return spans[group[0]] - problem.group_seconds(group[1], group[2])

    ranked = sorted(groups, key=lambda group: (slack_s(group), group))
    half = MOST_FREE_GROUPS // 2
    eased = ranked if len(ranked) <= 2 * half else ranked[:half] + ranked[-half:]
    each = max(1, MOST_FREE_SAMPLES // len(eased))
    free = sorted(sample for _, _, samples in eased for sample in samples[:each])
    held = set(free)
    slots = [
        Slot(chosen, problem.degrees.index(degree), tuple(s for s in samples if s not in held), optional=False)
        for chosen, degree, samples in groups
    ]
    found = _solve(problem, slots, free, sum(spans.values()), time_limit_s)
    others = [groups for number, groups in enumerate(draft) if number not in pair]
    return draft if found is None else _better(problem, draft, others + found)


def _solve(problem: Problem, slots: list[Slot], free: list[int], below_s: float, time_limit_s: float) -> Draft | None:
    """The best way found to put the free samples into the slots, or None; exact memory is checked afterwards.

    Args:
        below_s: seconds of these micro-batches that are known to be possible.
    """
    import mip as untyped  # here, so that the planner works where the solver is not installed

    mip = cast("Any", untyped)  # its hints ask for `Real`, which int and float are not to a type checker
    lengths = sorted({problem.lengths[sample] for sample in free}, reverse=True)
    model = mip.Model(sense=mip.MINIMIZE, solver_name=mip.CBC)
    model.verbose, model.threads, model.seed = 0, 1, 0
    numbers = sorted({slot.micro_batch for slot in slots})
    spans = {m: model.add_var(lb=0.0) for m in numbers}
    used = [model.add_var(var_type=mip.BINARY, lb=0.0 if slot.optional else 1.0) for slot in slots]
    counts: list[dict[int, Any]] = []
    for slot, exists in zip(slots, used, strict=True):
        degree, fixed_s = problem.degrees[slot.index], problem.fixed_s[slot.index]
        room = problem.capacity * degree - sum(problem.lengths[sample] for sample in slot.kept)
        kept_s = problem.group_seconds(degree, slot.kept) - fixed_s
        count = {
            length: model.add_var(var_type=mip.INTEGER, lb=0, ub=room // length) for length in lengths if length <= room
        }
        work = mip.xsum(problem.cost.work(length, degree) / degree * n for length, n in count.items())
        model += (
            mip.xsum(length / problem.capacity * n for length, n in count.items()) <= room / problem.capacity * exists
        )
        model += fixed_s * exists + kept_s + work <= spans[slot.micro_batch]
        counts.append(count)
    for length, num in Counter(problem.lengths[sample] for sample in free).items():
        model += mip.xsum(count[length] for count in counts if length in count) == num
    for m in numbers:
        ranks = [problem.degrees[slot.index] * n for slot, n in zip(slots, used, strict=True) if slot.micro_batch == m]
        model += mip.xsum(ranks) <= problem.num_ranks
    if all(slot.optional for slot in slots):
        for first, second in pairwise(numbers):
            model += spans[first] >= spans[second]  # micro-batches are alike: look at one order only
        for first, second in pairwise(range(len(slots))):
            if slots[first] == slots[second]:
                model += used[first] >= used[second]  # and so are groups
    model.objective = mip.xsum(spans.values())
    model += mip.xsum(spans.values()) <= below_s * (1 - GAIN / 10)
    model.optimize(max_seconds=time_limit_s)
    if not model.num_solutions:
        return None
    return _read(problem, slots, free, [{length: round(n.x) for length, n in count.items()} for count in counts])


def _read(problem: Problem, slots: list[Slot], free: list[int], counts: list[dict[int, int]]) -> Draft | None:
    """The solver's counts as a draft, or None where its tolerances lost a sample or a token of memory."""
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
    return None if lost or crowded else list(draft.values())
