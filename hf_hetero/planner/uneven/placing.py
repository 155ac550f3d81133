"""Placing chooses where the groups of a micro-batch stand, so that the slowest of them ends as early as can be.

Groups keep their samples, and ranks of a group are aligned, so that what is chosen is which block of ranks each has: a
bottleneck assignment, solved by its threshold (Burkard, Dell'Amico and Martello, Assignment Problems, 2009, section
6.2). For a limit of seconds, degrees are taken largest first, and of each degree the heaviest group first; it gets the
slowest block that holds it within the limit. Within a degree no choice is better where blocks differ in one speed only:
whatever holds a group holds every lighter one, so that fast blocks are left for those that need them. Between degrees
it is a rule of thumb.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from hf_hetero.costs import Charges, CostModel
from hf_hetero.costs.places import Place, Places
from hf_hetero.plan import Group, MicroBatch, Plan


class Load(NamedTuple):
    """A `Load` is what a group takes, in seconds, where all is of full speed.

    Args:
        degree: ranks of the group.
        computed_s: divided by the speed of its slowest rank.
        exchanged_s: divided by that of its slowest link.
        fixed_s: the same everywhere.
        num_samples: of the group; what is of many can be dealt out anew.
    """

    degree: int
    computed_s: float
    exchanged_s: float
    fixed_s: float
    num_samples: int = 1

    def seconds(self, place: Place) -> float:
        """Return the seconds of the group at a place."""
        return self.computed_s / place.rank_speed + self.exchanged_s / place.link_speed + self.fixed_s


def load_of(group: Group, charges: Charges) -> Load:
    """Return the load of a group that costs so much on an even machine."""
    computed_s = charges.attention_s + charges.linear_s
    return Load(group.degree, computed_s, charges.exchange_s, charges.fixed_s, len(group.samples))


Arrangement = Callable[[int, Sequence[Load], Places], list[int]]
"""Ranks of the run, loads and places -> the first rank of each group."""


def placed(plan: Plan, by_sequence: Plan, cost: CostModel, lengths: Sequence[int], arrangement: Arrangement) -> Plan:
    """Give the groups of each micro-batch other ranks; `seconds` are left to the caller.

    Args:
        plan: by item.
        by_sequence: the same, by sequence.
        cost: of the uneven machine.
        lengths: tokens of each sequence of the global batch.
        arrangement: `arranged`, or `set_apart`.
    """
    even, places = cost.evened(), cost.places
    micro_batches: list[MicroBatch] = []
    for ours, theirs in zip(plan.micro_batches, by_sequence.micro_batches, strict=True):
        held = [(group, of) for group, of in zip(ours.groups, theirs.groups, strict=True) if group.samples]
        loads = [load_of(of, even.charges(of, lengths)) for _, of in held]
        starts = arrangement(plan.num_ranks, loads, places)
        groups = [
            replace(group, ranks=tuple(range(start, start + group.degree)))
            for (group, _), start in zip(held, starts, strict=True)
        ]
        micro_batches.append(filled(groups, plan.num_ranks))
    return replace(plan, micro_batches=tuple(micro_batches))


def arranged(num_ranks: int, loads: Sequence[Load], places: Places) -> list[int]:
    """Return the first rank of each group, so that the slowest group is about as fast as can be.

    Args:
        num_ranks: no fewer than the degrees add up to, which are those of `usable_degrees`.
        loads: of each group.
        places: how fast which ranks are.
    """
    blocks = _blocks(num_ranks, sorted({load.degree for load in loads}), places)
    order = sorted(range(len(loads)), key=lambda number: (-loads[number].degree, -loads[number].seconds(Place(1, 1))))
    seconds = [{place: load.seconds(place) for place in blocks[load.degree]} for load in loads]
    least_s = max((min(of.values()) for of in seconds), default=0.0)
    limits = sorted({s for of in seconds for s in of.values() if s >= least_s})
    # with the last of the limits every block holds every group, and the largest first always find one
    found = bisect_left(
        limits, True, key=lambda limit: _arranged(num_ranks, loads, order, blocks, seconds, limit) != []
    )
    return _arranged(num_ranks, loads, order, blocks, seconds, limits[found]) if limits else []


def set_apart(num_ranks: int, loads: Sequence[Load], places: Places) -> list[int]:
    """Return the first rank of each group, so that what is slow is left to the smallest groups of the most samples.

    That is no good plan by itself, but one that samples can be moved in: a group waits for its slowest rank, so that
    few ranks shall share it, and what stays there shall be easy to deal out.
    """
    blocks = _blocks(num_ranks, sorted({load.degree for load in loads}), places)
    order = sorted(range(len(loads)), key=lambda n: (-loads[n].degree, loads[n].num_samples, -loads[n].computed_s))
    # the fastest block is the slowest of those with the fewest seconds, so that what is left is what is slow
    seconds = [{place: -load.seconds(place) for place in blocks[load.degree]} for load in loads]
    return _arranged(num_ranks, loads, order, blocks, seconds, math.inf)


Blocks = dict[int, dict[Place, list[int]]]
"""Degree -> place -> first ranks of the blocks there, descending."""


def _blocks(num_ranks: int, degrees: Sequence[int], places: Places) -> Blocks:
    """List the aligned blocks of ranks of some degrees."""
    blocks: Blocks = {degree: {} for degree in degrees}
    for degree, by_place in blocks.items():
        for start in reversed(range(0, num_ranks - degree + 1, degree)):
            by_place.setdefault(places.of(range(start, start + degree)), []).append(start)
    return blocks


def _arranged(
    num_ranks: int,
    loads: Sequence[Load],
    order: Sequence[int],
    blocks: Blocks,
    seconds: Sequence[dict[Place, float]],
    limit_s: float,
) -> list[int]:
    """Return the first rank of each group, none of which takes longer than the limit; [] where one finds no block."""
    taken, starts = bytearray(num_ranks), [-1] * len(loads)
    free: dict[Place, list[int]] = {}
    degree = 0
    for number in order:
        if loads[number].degree != degree:
            degree = loads[number].degree
            # of a block whose first rank is free all are: what was taken so far is aligned, and no smaller
            free = {place: [s for s in of if not taken[s]] for place, of in blocks[degree].items()}
        slowest = max(
            ((s, place) for place, s in seconds[number].items() if s <= limit_s and free[place]), default=None
        )
        if slowest is None:
            return []
        starts[number] = start = free[slowest[1]].pop()
        taken[start : start + degree] = b"\1" * degree
    return starts


def filled(groups: Sequence[Group], num_ranks: int) -> MicroBatch:
    """Return the micro-batch of some groups, in which the other ranks stand alone."""
    taken = {rank for group in groups for rank in group.ranks}
    alone = [Group((rank,), ()) for rank in range(num_ranks) if rank not in taken]
    return MicroBatch(tuple(sorted([*groups, *alone], key=lambda group: group.ranks)))
