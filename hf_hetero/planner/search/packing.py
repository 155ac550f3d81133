"""Packing asks whether samples fit into micro-batches of given durations: best-fit decreasing over memory and time.

To find short schedules by packing into bins as long as the schedule may last is MULTIFIT (Coffman, Garey and Johnson,
SIAM J. Comput. 7, 1978); best-fit decreasing is Johnson's (J. Comput. Syst. Sci. 8, 1974). Here a group's room is the
longest sample that its memory and its time both leave, so that one sorted list of rooms serves all groups.

What is packed is right by construction: a sample only joins a group whose room holds it, groups only take free ranks of
their micro-batch, and joining groups keeps their ranks. Degrees are powers of two, or all ranks, so that groups which
are no more than the ranks can be placed aligned, largest first; no place is chosen here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from hf_hetero.planner.draft import Draft
from hf_hetero.planner.problem import Problem

ROUNDING = 1 + 1e-12
"""How far a duration is exceeded: the makespan of a packing, given back as a duration, must hold the same packing."""
JOINS = (2, 4, 8)
"""How many equal groups may be joined; the largest number also says which rooms are given up. Half, up to 4: ±0.0 %,
CPU +1 %; double, from 4 to 16: ±0.0 % (-0.1 to +0.4), CPU -1 % (all)."""


@dataclass(slots=True)
class Packing:
    """A `Packing` is groups in the making. Its lists are indexed by group; one that was merged away has no samples.

    Args:
        durations: seconds of each micro-batch.
        micro_batch: which micro-batch the group is in.
        degree: index of its degree.
        tokens: tokens it still has memory for.
        work: rank-seconds it still has time for.
        samples: what it holds.
        free: ranks of each micro-batch that no group has.
        rooms: `longest sample that still fits << shift | group`, ascending; groups with no room are left out.
        shift: bits that hold a group's number.
        spare_tokens: tokens of memory that may still be lost in groups without room.
        spare_work: rank-seconds that may still be lost there.
    """

    durations: list[float]
    micro_batch: list[int]
    degree: list[int]
    tokens: list[int]
    work: list[float]
    samples: list[list[int]]
    free: list[int]
    rooms: list[int]
    shift: int
    spare_tokens: int
    spare_work: float

    def draft(self, problem: Problem) -> Draft:
        """Return the micro-batches that hold samples."""
        return [groups for groups in self.listed(problem) if groups]

    def listed(self, problem: Problem) -> Draft:
        """List the groups that hold samples, by micro-batch, in the order of the durations."""
        draft: Draft = [[] for _ in self.durations]
        for group, samples in enumerate(self.samples):
            if samples:
                draft[self.micro_batch[group]].append((problem.degrees[self.degree[group]], samples))
        return draft

    def makespans(self, problem: Problem) -> tuple[float, ...]:
        """Return the seconds that each micro-batch really takes; those without samples are left out."""
        spans = [-1.0] * len(self.durations)
        for group, samples in enumerate(self.samples):
            if samples:
                index = self.micro_batch[group]
                seconds = self.durations[index] - self.work[group] / problem.degrees[self.degree[group]]
                spans[index] = max(spans[index], seconds, problem.fixed_s[0])
        return tuple(seconds for seconds in spans if seconds >= 0)


def pack(problem: Problem, durations: Sequence[float]) -> Packing | None:
    """Put all samples, longest first, into the group that they fill best; None where one finds no room.

    Args:
        durations: seconds of each micro-batch, descending: long samples go where they need few ranks.
    """
    attention, linear_s = problem.cost.attention_s_per_token2, problem.linear_s
    useful = -(-problem.lengths[-1] // JOINS[-1])  # smaller rooms are given up: even 8 like them hold no sample
    packing = _empty(problem, durations)
    rooms, shift, mask = packing.rooms, packing.shift, (1 << packing.shift) - 1
    degree, tokens, work, samples = packing.degree, packing.tokens, packing.work, packing.samples
    longest = [longest_samples(problem, seconds) for seconds in durations]
    # this loop is most of what planning takes, so that the lines of `_room` stand here once more, without the call
    for sample, length in enumerate(problem.lengths):
        tightest = bisect_left(rooms, length << shift)
        if tightest < len(rooms):
            group = rooms.pop(tightest) & mask
        else:
            group = _open(problem, packing, longest, length)
            if group < 0:
                group = _merge(problem, packing, length)
            if group < 0:
                return None
        linear = linear_s[degree[group]]
        memory = tokens[group] = tokens[group] - length
        time = work[group] = work[group] - (attention * length + linear) * length
        samples[group].append(sample)
        if (attention * memory + linear) * memory <= time:
            room = memory
        else:
            room = int(2 * time / (linear + sqrt(linear * linear + 4 * attention * time))) if time > 0 else 0
        if room >= useful:
            insort(rooms, room << shift | group)
        else:
            # Nothing is ever put here again: joins are chosen among the rooms, too. Spare is what all groups can lose
            # if every token is as cheap as at the cheapest degree: once more is lost, samples will be left out.
            packing.spare_tokens -= memory
            packing.spare_work -= time
            if packing.spare_tokens < 0 or packing.spare_work < 0:
                return None
    return packing


def _empty(problem: Problem, durations: Sequence[float]) -> Packing:
    """Start with micro-batches without groups."""
    shift = (len(durations) * problem.num_ranks).bit_length()
    free = [problem.num_ranks] * len(durations)
    tokens = problem.capacity * sum(free) - problem.num_tokens
    fixed_s = min(problem.fixed_s)
    time = sum(max(0.0, seconds - fixed_s) for seconds in durations) * problem.num_ranks
    work = time * (1 + 1e-9) - problem.least_work
    return Packing(list(durations), [], [], [], [], [], free, [], shift, tokens, work)


def longest_samples(problem: Problem, duration_s: float) -> list[int]:
    """Return the tokens of the longest sample that a group of each degree, or a smaller one, holds within a duration.

    Ascending, so that the smallest degree that holds a sample is found by bisection; -1 where none is held.
    """
    limits: list[int] = []
    longest = -1
    for index, degree in enumerate(problem.degrees):
        time = degree * (duration_s - problem.fixed_s[index]) * ROUNDING
        longest = max(longest, _room(problem, index, problem.capacity * degree, time))
        limits.append(longest)
    return limits


def _room(problem: Problem, index: int, memory: int, time: float) -> int:
    """Return the longest sample that fits into this many tokens and rank-seconds; -1 where none does."""
    attention, linear = problem.cost.attention_s_per_token2, problem.linear_s[index]
    if (attention * memory + linear) * memory <= time:
        return memory
    if time <= 0:
        return -1
    return int(2 * time / (linear + sqrt(linear * linear + 4 * attention * time)))


def _open(problem: Problem, packing: Packing, longest: list[list[int]], length: int) -> int:
    """Open a group in the first micro-batch with enough free ranks, where it needs fewest; -1 where there is none."""
    degrees = problem.degrees
    for micro_batch, free in enumerate(packing.free):
        if free:
            index = bisect_left(longest[micro_batch], length)
            if index < len(degrees) and degrees[index] <= free:
                degree = degrees[index]
                packing.free[micro_batch] = free - degree
                packing.micro_batch.append(micro_batch)
                packing.degree.append(index)
                packing.tokens.append(problem.capacity * degree)
                time = packing.durations[micro_batch] - problem.fixed_s[index]
                packing.work.append(degree * time * ROUNDING)
                packing.samples.append([])
                return len(packing.degree) - 1
    return -1


def _merge(problem: Problem, packing: Packing, length: int) -> int:
    """Make room for a sample by joining 2, 4 or 8 equal groups whose rooms together hold it; -1 where that fails.

    Memory that is lost at the ends of small groups is won back this way, for the price of an exchange.
    """
    rooms, shift, mask = packing.rooms, packing.shift, (1 << packing.shift) - 1
    alike: dict[tuple[int, int], list[int]] = {}
    best: tuple[float, int, float, list[int]] | None = None
    for key in reversed(rooms):
        if (key >> shift) * JOINS[-1] < length:
            break  # from here on, rooms are too small to help
        group = key & mask
        keys = alike.setdefault((packing.micro_batch[group], packing.degree[group]), [])
        if len(keys) == JOINS[-1]:
            continue
        keys.append(key)
        if len(keys) in JOINS:  # the largest rooms come first, so that these are the best so many of their kind
            join = _join(problem, packing, [key & mask for key in keys], length)
            if join is not None and (best is None or join < best):
                best = *join, keys[:]
                if problem.linear_s[join[1]] <= problem.cheap_exchange_s:
                    break
    if best is None:
        return -1
    _, large, work, keys = best
    for key in keys:
        del rooms[bisect_left(rooms, key)]
    # the number of a group stays its own, and none is used again: the others stay as empty entries
    joined, *gone = (key & mask for key in keys)
    for group in gone:
        packing.samples[joined] += packing.samples[group]
        packing.tokens[joined] += packing.tokens[group]
        packing.samples[group] = []
    packing.degree[joined], packing.work[joined] = large, work
    return joined


def _join(problem: Problem, packing: Packing, groups: list[int], length: int) -> tuple[float, int, float] | None:
    """Join groups: rank-seconds lost, degree index, rank-seconds left; None where the sample stays out."""
    small, tokens = packing.degree[groups[0]], sum(packing.tokens[group] for group in groups)
    degree = problem.degrees[small] * len(groups)
    if tokens < length or degree not in problem.degrees:
        return None
    large = problem.degrees.index(degree)
    moved = problem.capacity * degree - tokens
    # attention takes the same rank-seconds at any degree; what the groups hold now pays the larger one's exchange
    dearer = (problem.linear_s[large] - problem.linear_s[small]) * moved
    fixed = (problem.fixed_s[large] - problem.fixed_s[small]) * degree
    work = sum(packing.work[group] for group in groups) - dearer - fixed
    return (dearer, large, work) if _room(problem, large, tokens, work) >= length else None
