"""Do these samples fit into micro-batches of given durations? Best-fit decreasing with memory and time."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from math import sqrt

from hf_hetero.planner.draft import DraftGroup, DraftMicroBatch
from hf_hetero.planner.problem import Problem


def pack(problem: Problem, samples: Sequence[int], duration_s: float, floor: int) -> DraftMicroBatch | None:
    """Groups of one micro-batch that lasts no longer than this, or None where a sample finds no room.

    Args:
        samples: positions in the batch, longest first.
        floor: index of the smallest degree that is opened.
    """
    lengths, degrees, capacity = problem.lengths, problem.degrees, problem.capacity
    attention = problem.cost.attention_s_per_token2
    groups: list[DraftGroup] = []
    state: list[tuple[int, int, float]] = []  # degree index, tokens left, rank-seconds left
    rooms: list[tuple[int, int]] = []  # (longest sample that still fits, group), ascending
    free = problem.num_ranks
    budgets = [d * (duration_s - problem.fixed_s[x]) * (1 + 1e-12) for x, d in enumerate(degrees)]
    longest = [_room(problem, x, capacity * d, budgets[x]) for x, d in enumerate(degrees)]
    for sample in samples:
        length = lengths[sample]
        found = bisect_left(rooms, (length, -1))
        if found < len(rooms):
            group = rooms.pop(found)[1]
            index, memory, time = state[group]
        else:
            index = next((x for x in range(floor, len(degrees)) if longest[x] >= length and degrees[x] <= free), -1)
            if index < 0:
                return None
            group, memory, time = len(groups), capacity * degrees[index], budgets[index]
            free -= degrees[index]
            groups.append((degrees[index], []))
            state.append((index, memory, time))
        groups[group][1].append(sample)
        memory -= length
        time -= (attention * length + problem.linear_s[index]) * length
        state[group] = (index, memory, time)
        insort(rooms, (_room(problem, index, memory, time), group))
    return groups


def _room(problem: Problem, index: int, memory: int, time: float) -> int:
    """Longest sample that fits into this many tokens and rank-seconds; -1 where nothing does."""
    if time <= 0 or memory <= 0:
        return -1
    linear = problem.linear_s[index]
    slope = linear + sqrt(linear * linear + 4 * problem.cost.attention_s_per_token2 * time)
    return memory if 2 * time >= slope * memory else int(2 * time / slope)
