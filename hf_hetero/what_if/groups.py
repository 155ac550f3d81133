"""What planners of other systems share: groups of one micro-batch in the making, and their ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush

from hf_hetero.plan import Group, MicroBatch

Open = list[tuple[int, list[int]]]
"""Degree and samples of each group of a micro-batch; a sample is named by its place in the batch."""


def doubled(groups: Open, num_ranks: int, degrees: Sequence[int]) -> Open:
    """Give free ranks to the smallest groups that can double."""
    groups, free = list(groups), num_ranks - sum(degree for degree, _ in groups)
    smallest = [(degree, number) for number, (degree, _) in enumerate(groups)]
    heapify(smallest)
    while smallest and smallest[0][0] <= free:
        degree, number = heappop(smallest)
        if 2 * degree in degrees:
            groups[number] = (2 * degree, groups[number][1])
            heappush(smallest, (2 * degree, number))
            free -= degree
    return groups


def named(groups: Iterable[tuple[int, Sequence[int]]], num_ranks: int) -> MicroBatch:
    """Give the groups that hold samples ranks, largest first, so that each is aligned; ranks left over are alone."""
    members: list[Group] = []
    start = 0
    for degree, samples in sorted((group for group in groups if group[1]), key=lambda group: -group[0]):
        members.append(Group(tuple(range(start, start + degree)), tuple(samples)))
        start += degree
    return MicroBatch((*members, *(Group((rank,), ()) for rank in range(start, num_ranks))))
