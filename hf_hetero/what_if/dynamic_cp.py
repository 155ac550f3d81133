"""This module plans as Megatron-Core's dynamic context parallelism describes itself (Megatron-LM, PRs 2282 and 5679).

Each sample gets the smallest power of two of ranks that holds it. Longest first, the samples are cut into micro-batches
of equal work; in each, the next sample goes to free ranks, or to the lightest group of its degree with room, else it
waits for the next micro-batch. Ranks that stay free are given to the smallest groups, which double.

Megatron counts work as s^2 / degree; here it is the cost model's seconds, which balances better. Its limit of tokens a
rank (`max_seqlen_per_rank`) is a setting; here it is all that memory holds, or less where that is faster, chosen for
each batch, as is the number of micro-batches. What is released by now follows another rule (`megatron`), which is
faster for some batches; `rivals` takes the faster of both as the tuned line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from hf_hetero.costs import CostModel
from hf_hetero.plan import MicroBatch, Plan
from hf_hetero.what_if.groups import Open, doubled, named

MORE_MICRO_BATCHES = 4  # numbers of micro-batches that are tried
LIMITS = (1, 2, 4, 8)  # parts of a rank's memory that a sample may fill before it gets more ranks


def dynamic_cp(lengths: Sequence[int], cost: CostModel, num_ranks: int, degrees: Sequence[int]) -> Plan:
    """Plan a batch in a few such ways, and return the fastest plan.

    Args:
        lengths: tokens of each sample of the global batch; the largest degree holds each of them.
        cost: machine and model.
        num_ranks: ranks of the run.
        degrees: to choose from, ascending.
    """
    fewest = max(1, -(-sum(lengths) // (num_ranks * cost.capacity_tokens)))
    most = degrees[-1]
    plans: list[Plan] = []
    for limit in (cost.capacity_tokens / part for part in LIMITS):
        degree_of = [next((d for d in degrees if d * limit >= length), most) for length in lengths]
        plans += [
            _planned(lengths, degree_of, cost, num_ranks, degrees, fewest + more) for more in range(MORE_MICRO_BATCHES)
        ]
    return min(plans, key=lambda plan: cost.plan_seconds(plan, lengths))


def _planned(
    lengths: Sequence[int],
    degree_of: Sequence[int],
    cost: CostModel,
    num_ranks: int,
    degrees: Sequence[int],
    parts: int,
) -> Plan:
    """Make a plan of at least this many micro-batches, of as nearly equal work as memory lets them have."""
    waiting = sorted(range(len(lengths)), key=lambda sample: (-lengths[sample], sample))
    work_of = {sample: cost.work(lengths[sample], degree_of[sample]) for sample in waiting}
    share = sum(work_of.values()) / parts
    micro_batches: list[MicroBatch] = []
    while waiting:
        groups, waiting = _filled(waiting, lengths, degree_of, work_of, share, num_ranks, cost.capacity_tokens)
        micro_batches.append(named(doubled(groups, num_ranks, degrees), num_ranks))
    return Plan(num_ranks, tuple(micro_batches))


def _filled(
    waiting: list[int],
    lengths: Sequence[int],
    degree_of: Sequence[int],
    work_of: dict[int, float],
    share: float,
    num_ranks: int,
    capacity: int,
) -> tuple[Open, list[int]]:
    """Fill one micro-batch with about a share of the work; return its groups, and the samples left for the next."""
    groups: Open = []
    shelves: dict[int, _Shelf] = {}
    left: list[int] = []
    free, work = num_ranks, 0.0
    for position, sample in enumerate(waiting):
        if work >= share * (1 - 1e-9):  # equal parts reach it up to rounding
            return groups, left + waiting[position:]
        degree, length = degree_of[sample], lengths[sample]
        shelf = shelves.setdefault(degree, _Shelf(degree * capacity))
        if degree <= free:
            groups.append((degree, []))
            number, load, room = len(groups) - 1, 0.0, degree * capacity
            free -= degree
        elif (lightest := shelf.lightest(length)) is not None:
            load, number, room = lightest
        else:
            left.append(sample)
            continue
        groups[number][1].append(sample)
        heappush(shelf.groups, (load + work_of[sample] / degree, number, room - length))
        work += work_of[sample]
    return groups, left


@dataclass
class _Shelf:
    """A shelf holds the groups of one degree: a heap of their seconds, their numbers and their room in tokens.

    Args:
        most_room: no group has more, so that most calls in vain end at once.
    """

    most_room: int
    groups: list[tuple[float, int, int]] = field(default_factory=list[tuple[float, int, int]])

    def lightest(self, length: int) -> tuple[float, int, int] | None:
        """Take out the group with the fewest seconds that has room, if one has."""
        if length > self.most_room:
            return None
        passed: list[tuple[float, int, int]] = []
        lightest = None
        while self.groups and lightest is None:
            group = heappop(self.groups)
            if group[2] >= length:
                lightest = group
            else:
                passed.append(group)
        if lightest is None:  # all were looked at, and room only shrinks
            self.most_room = max((room for _, _, room in passed), default=0)
        for group in passed:
            heappush(self.groups, group)
        return lightest
