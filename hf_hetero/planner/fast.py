"""The fast search: cut the sorted samples into micro-batches, then give each the shortest duration that holds them."""

from __future__ import annotations

from bisect import bisect_left

from hf_hetero.planner.draft import Draft, DraftMicroBatch, draft_seconds, micro_batch_seconds
from hf_hetero.planner.packing import pack
from hf_hetero.planner.problem import Problem

EXTRA_MICRO_BATCHES = 4
BISECTIONS = 12


def fast_draft(problem: Problem) -> Draft | None:
    """The best of a few numbers of micro-batches, or None where none of them holds the samples."""
    fewest = problem.fewest_micro_batches
    drafts = [_with_micro_batches(problem, fewest + extra) for extra in range(EXTRA_MICRO_BATCHES)]
    found = [draft for draft in drafts if draft is not None]
    return min(found, key=lambda draft: draft_seconds(problem, draft), default=None)


def _with_micro_batches(problem: Problem, num_micro_batches: int) -> Draft | None:
    """Consecutive chunks of equal tokens, longest samples first (FlexSP's "blaster", arXiv:2412.01523, section 4.2)."""
    before = problem.tokens_before
    cuts = [bisect_left(before, before[-1] * part // num_micro_batches) for part in range(num_micro_batches + 1)]
    draft: Draft = []
    for first, last in zip(cuts[:-1], cuts[1:], strict=True):
        if first < last:
            groups = _shortest(problem, range(first, last))
            if groups is None:
                return None
            draft.append(groups)
    return draft


def _shortest(problem: Problem, samples: range) -> DraftMicroBatch | None:
    """One micro-batch of these samples, as short as bisection finds."""
    best: DraftMicroBatch | None = None
    work = sum(problem.cost.work(problem.lengths[sample], 1) for sample in samples)
    least = problem.fixed_s[0] + work / problem.num_ranks
    low, high = least, 64 * least
    for floor in range(len(problem.degrees)):
        floor_low, floor_high = low, high
        for _ in range(BISECTIONS):
            middle = (floor_low * floor_high) ** 0.5
            groups = pack(problem, samples, middle, floor)
            if groups is None:
                floor_low = middle
                continue
            seconds = micro_batch_seconds(problem, groups)
            floor_high = min(middle, seconds)
            if seconds < high:
                best, high = groups, seconds
    return best
