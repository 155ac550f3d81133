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
    num_micro_batches = _most_micro_batches(problem, draft)
    num_slots = num_micro_batches * sum(problem.num_ranks // degree for degree in problem.degrees)
    if num_slots * len(set(problem.lengths)) <= MOST_WHOLE_VARIABLES:
        slots = _all_slots(problem, num_micro_batches)
        samples = list(range(len(problem.lengths)))
        below_s = draft_seconds(problem, draft)
        found = _solve(problem, slots, samples, {}, below_s, time_limit_s)
        return draft if found is None else _better(problem, draft, list(found.values()))
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


def _resolved(problem: Problem, draft: Draft, pair: tuple[int, ...], time_limit_s: float) -> Draft:
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
    free = sorted(sample for _, _, samples in eased for sample in samples[:each])
    slots = [
        Slot(chosen, problem.degrees.index(degree), tuple(samples[each:]), optional=False)
        for chosen, degree, samples in eased
    ]
    least: dict[int, float] = {}
    for group in fixed:
        least[group[0]] = max(least.get(group[0], 0.0), spans[group[0]] - slack_s(group))
    found = _solve(problem, slots, free, least, sum(spans.values()), time_limit_s)
    if found is None:
        return draft
    changed = [groups for number, groups in enumerate(draft) if number not in pair]
    for chosen in pair:
        kept = [(degree, samples) for number, degree, samples in fixed if number == chosen]
        changed.append(kept + found.get(chosen, []))
    return _better(problem, draft, [groups for groups in changed if groups])


def _solve(
    problem: Problem,
    slots: list[Slot],
    free: list[int],
    least: dict[int, float],
    below_s: float,
    time_limit_s: float,
) -> dict[int, DraftMicroBatch] | None:
    """The best way found to put the free samples into the slots, or None; exact memory is checked afterwards.

    Args:
        least: seconds that a micro-batch takes anyway.
        below_s: seconds of these micro-batches that are known to be possible.
    """
    import mip as untyped  # here, so that the planner works where the solver is not installed

    mip = cast("Any", untyped)  # its hints ask for `Real`, which int and float are not to a type checker
    lengths = sorted({problem.lengths[sample] for sample in free}, reverse=True)
    model = mip.Model(sense=mip.MINIMIZE, solver_name=mip.CBC)
    model.verbose, model.threads, model.seed = 0, 1, 0
    numbers = sorted({slot.micro_batch for slot in slots} | set(least))
    spans = {m: model.add_var(lb=least.get(m, 0.0)) for m in numbers}
    used = [model.add_var(var_type=mip.BINARY, lb=0.0 if slot.optional else 1.0) for slot in slots]
    counts: list[dict[int, Any]] = []
    for slot, exists in zip(slots, used, strict=True):
        degree, fixed_s = problem.degrees[slot.index], problem.fixed_s[slot.index]
        room = problem.capacity * degree - sum(problem.lengths[sample] for sample in slot.kept)
        kept_s = problem.group_seconds(degree, slot.kept) - fixed_s
        fitting = [length for length in lengths if length <= room]
        count = {length: model.add_var(var_type=mip.INTEGER, lb=0, ub=room // length) for length in fitting}
        work = mip.xsum(problem.cost.work(length, degree) / degree * n for length, n in count.items())
        tokens = mip.xsum(length / problem.capacity * n for length, n in count.items())
        model += tokens <= room / problem.capacity * exists
        model += fixed_s * exists + kept_s + work <= spans[slot.micro_batch]
        counts.append(count)
    for length, num in Counter(problem.lengths[sample] for sample in free).items():
        model += mip.xsum(count[length] for count in counts if length in count) == num
    if all(slot.optional for slot in slots):
        _add_choice_of_groups(problem, slots, mip, model, spans, used)
    model.objective = mip.xsum(spans.values())
    model += mip.xsum(spans.values()) <= below_s * (1 - GAIN / 10)
    model.optimize(max_seconds=time_limit_s)
    if not model.num_solutions:
        return None
    return _read(problem, slots, free, [{length: round(n.x) for length, n in count.items()} for count in counts])


def _add_choice_of_groups(
    problem: Problem, slots: list[Slot], mip: Any, model: Any, spans: dict[int, Any], used: list[Any]
) -> None:
    """The groups of a micro-batch share its ranks; of the orders of like groups and micro-batches, keep only one."""
    for m in spans:
        ranks = [problem.degrees[slot.index] * n for slot, n in zip(slots, used, strict=True) if slot.micro_batch == m]
        model += mip.xsum(ranks) <= problem.num_ranks
    for first, second in pairwise(spans):
        model += spans[first] >= spans[second]
    for first, second in pairwise(range(len(slots))):
        if slots[first] == slots[second]:
            model += used[first] >= used[second]


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
