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
from typing import NamedTuple

from hf_hetero.planner.draft import Draft
from hf_hetero.planner.problem import MAX_TOKENS, Problem
from hf_hetero.planner.search.joining import Joins, least_useful_room

ROUNDING = 1 + 1e-12
"""How far a duration is exceeded: the makespan of a packing, given back as a duration, must hold the same packing."""


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

    def loses(self, memory: int, time: float) -> bool:
        """Give up what is left of a group without room, and tell whether too much is lost.

        Nothing is ever put there again: joins are chosen among the rooms, too. Spare is what all groups can lose if
        every token is as cheap as at the cheapest degree: once more is lost, samples will be left out.
        """
        self.spare_tokens -= memory
        self.spare_work -= time
        return self.spare_tokens < 0 or self.spare_work < 0

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


class Place(NamedTuple):
    """A `Place` is where a sample that fits nowhere else opens a group.

    It stays the same until its ranks are taken, or until samples get so short that a micro-batch holds them at a
    smaller degree.

    Args:
        micro_batch: where the group is opened.
        degree: index of its degree.
        ranks: its degree; 0 where there is no place.
        tokens: that it has memory for.
        work: rank-seconds that it has time for.
        until: a sample of so many tokens, or fewer, may have another place.
    """

    micro_batch: int
    degree: int
    ranks: int
    tokens: int
    work: float
    until: int


UNKNOWN = Place(0, 0, 0, 0, 0.0, MAX_TOKENS)
"""Before a place is looked for: every sample may have another one."""


def pack(problem: Problem, durations: Sequence[float]) -> Packing | None:
    """Put all samples, longest first, into the group that they fill best; None where one finds no room.

    Args:
        durations: seconds of each micro-batch, descending: long samples go where they need few ranks.
    """
    attention, linear_s, useful = problem.cost.attention_s_per_token2, problem.linear_s, least_useful_room(problem)
    packing = _empty(problem, durations)
    rooms, shift, mask, free = packing.rooms, packing.shift, (1 << packing.shift) - 1, packing.free
    micro_batch, degree, samples = packing.micro_batch, packing.degree, packing.samples
    tokens, work = packing.tokens, packing.work
    longest = [longest_samples(problem, seconds) for seconds in durations]
    place, index, ranks, most_memory, most_time, until = UNKNOWN
    joins: Joins | None = None
    # this loop is most of what planning takes, so that the lines of `Problem.room` stand here once more, and nothing is
    # called that need not be
    for sample, length in enumerate(problem.lengths):
        tightest = bisect_left(rooms, length << shift)
        if tightest < len(rooms):
            key = rooms.pop(tightest)
            group = key & mask
            if joins is not None:
                joins.remove(key)
        else:
            if length <= until or free[place] < ranks:
                place, index, ranks, most_memory, most_time, until = _place(problem, packing, longest, length)
            if ranks:
                free[place] -= ranks
                group = len(degree)
                micro_batch.append(place)
                degree.append(index)
                tokens.append(most_memory)
                work.append(most_time)
                samples.append([])
            else:
                if joins is None:
                    joins = Joins(problem, rooms, shift, micro_batch, degree, tokens, work)
                group = _joined(packing, joins, length)
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
            key = room << shift | group
            insort(rooms, key)
            if joins is not None:
                joins.add(key)
        elif packing.loses(memory, time):
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
        longest = max(longest, problem.room(index, problem.capacity * degree, time))
        limits.append(longest)
    return limits


def _place(problem: Problem, packing: Packing, longest: list[list[int]], length: int) -> Place:
    """Find where a sample opens a group: in the first micro-batch with enough free ranks, where it needs fewest.

    Args:
        longest: for each micro-batch, what `longest_samples` says.
        length: of the sample.
    """
    until = -1
    for micro_batch, free in enumerate(packing.free):
        if free:
            index = bisect_left(longest[micro_batch], length)
            if index:
                until = max(until, longest[micro_batch][index - 1])
            if index < len(problem.degrees) and problem.degrees[index] <= free:
                ranks = problem.degrees[index]
                work = ranks * (packing.durations[micro_batch] - problem.fixed_s[index]) * ROUNDING
                return Place(micro_batch, index, ranks, problem.capacity * ranks, work, until)
    return Place(0, 0, 0, 0, 0.0, until)


def _joined(packing: Packing, joins: Joins, length: int) -> int:
    """Make room for a sample by joining groups; -1 where that fails."""
    join = joins.best(length)
    if join is None:
        return -1
    rooms, mask = packing.rooms, (1 << packing.shift) - 1
    keys = joins.take(join)
    for key in keys:
        del rooms[bisect_left(rooms, key)]
    # the number of a group stays its own, and none is used again: the others stay as empty entries
    joined, *gone = (key & mask for key in keys)
    for group in gone:
        packing.samples[joined] += packing.samples[group]
        packing.tokens[joined] += packing.tokens[group]
        packing.samples[group] = []
    packing.degree[joined], packing.work[joined] = join.degree, join.work
    return joined
