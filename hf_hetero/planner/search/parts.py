"""Parts make very large runs plannable: one part of the ranks is searched, for a like part of the samples.

Sorted samples are dealt out to the parts like cards, so that all parts look alike. The others are packed into the
durations found in the first one, a little stretched where they must be.
"""

from __future__ import annotations

from collections.abc import Callable

from hf_hetero.planner.draft import Draft, micro_batch_seconds
from hf_hetero.planner.problem import Problem
from hf_hetero.planner.search.packing import pack

MOST_RANKS_A_PART = 1024
"""Ranks, at most, that are searched as one. Half: ±0.0 %, CPU -11 %; double: -0.1 % (-0.4 to 0), CPU +28 % (large)."""
STRETCHES = (1.0, 1.002, 1.004, 1.007, 1.01, 1.015, 1.02, 1.03, 1.05, 1.08, 1.12, 1.2, 1.5)
"""How much longer than the first part's durations those of another part may be, in the order tried. Half: ±0.0 %,
CPU +2 %; double: ±0.0 %, CPU +8 % (large)."""


def num_parts(problem: Problem) -> int:
    """Choose in how many equal parts to plan the ranks; 1 unless there are very many and every degree fits a part."""
    parts = -(-problem.num_ranks // MOST_RANKS_A_PART)
    while problem.num_ranks % parts:
        parts += 1
    part_ranks = problem.num_ranks // parts
    fits = all(part_ranks % degree == 0 for degree in problem.degrees)
    return parts if fits and len(problem.lengths) >= max(part_ranks, 4 * parts) else 1


def plan_in_parts(problem: Problem, parts: int, search: Callable[[Problem], Draft | None]) -> Draft | None:
    """Make a draft of drafts for parts of the ranks; None where a part does not hold its samples."""
    first, *others = (_part(problem, parts, part) for part in range(parts))
    draft = search(first)
    if draft is None:
        return None
    # in one order, slowest first: micro-batch i of every part becomes part of micro-batch i of the run
    durations = sorted((micro_batch_seconds(first, groups) for groups in draft), reverse=True)
    draft = sorted(draft, key=lambda groups: -micro_batch_seconds(first, groups))
    together = [[(degree, [first.order[s] for s in samples]) for degree, samples in groups] for groups in draft]
    for part in others:
        part_draft = _follow(part, durations)
        if part_draft is None:
            return None
        for groups, more in zip(together, part_draft, strict=True):
            groups += [(degree, [part.order[s] for s in samples]) for degree, samples in more]
    return together


def _part(problem: Problem, parts: int, part: int) -> Problem:
    """Take every so many-th sample and its share of the ranks; `order` names the samples of the whole problem."""
    turns = (part, 2 * parts - 1 - part)  # there and back, so that no part always gets the longer sample
    order = [sample for sample in range(len(problem.lengths)) if sample % (2 * parts) in turns]
    lengths = tuple(problem.lengths[sample] for sample in order)
    return Problem(problem.cost, problem.num_ranks // parts, problem.degrees, lengths, tuple(order))


def _follow(part: Problem, durations: list[float]) -> Draft | None:
    """Pack the part's samples into micro-batches of about these durations, all of them listed, even without samples."""
    fixed_s = part.fixed_s[0]
    for stretch in STRETCHES:
        packing = pack(part, [fixed_s + (seconds - fixed_s) * stretch for seconds in durations])
        if packing is not None:
            return packing.listed(part)
    return None
