"""The layer for machines whose ranks or links are not alike: its plans are made of plans for the machine if they were.

What is searched there is who shares what with whom. Here groups get their places (`placing`), and samples go from slow
ranks to fast ones (`levelling`). The plan that knows nothing of speeds is always a candidate, as it is and placed, so
that none is slower; and no plan is faster than on a machine without slow ranks, so that what is proven there holds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from hf_hetero.costs import CostModel
from hf_hetero.plan import Plan
from hf_hetero.planner import methods, policies
from hf_hetero.planner.items import Items, sequences_of
from hf_hetero.planner.uneven.levelling import levelled
from hf_hetero.planner.uneven.placing import Arrangement, arranged, filled, placed, set_apart

MOVES_A_SAMPLE = 40
"""Moves of samples that are tried with each plan that is levelled, for each sample of the batch."""
MOVES_BY_RANKS = 20_000_000
"""The same times the ranks, at most: a move takes time in proportion to the groups beside it."""
MOST_REPLANNED = 4096
"""Samples, at most, of a batch that is planned as more than one even machine, and levelled from more than one plan."""
MOVES_A_SECOND = 300_000
"""Moves for each second that an improvement may take. A core without other work does more."""
WORTH_THEIR_MEMORY = 0.5
"""Least speed of ranks that samples are put on because there is room."""
MOST_LEVELLED = 3
"""Plans, at most, that are levelled: those that are fastest once they are placed, and the one of the even machine."""


def plan(items: Items, even: Plan, others: Iterable[Plan], allowed: Collection[str]) -> Plan:
    """Choose the fastest of several plans, each for other speeds than there are, once they are placed and levelled.

    Args:
        items: the batch, on the uneven machine; samples are items of one sequence.
        even: its plan on the even machine, with a bound.
        others: more plans to begin with.
        allowed: methods to choose from.
    """
    bound = max(even.lower_bound_s, policies.bound(items.as_sequences, allowed))
    ignoring = items.priced(even, allowed)
    rivals = sorted((_placed(items, way, allowed) for way in others), key=lambda way: way.seconds)
    most = MOST_LEVELLED if len(items.lengths) <= MOST_REPLANNED else 1
    begun = [_placed(items, even, allowed), *rivals[: most - 1]]
    begun += [_placed(items, way, allowed, set_apart) for way in begun]
    candidates = [ignoring, *begun, *rivals[most - 1 :]]
    num_moves = min(MOVES_A_SAMPLE * len(items.lengths), MOVES_BY_RANKS // even.num_ranks)
    for way in begun:
        candidates += _levelled(items, way, allowed, num_moves)
    best = min(candidates, key=lambda way: way.seconds)
    return _ordered(items, replace(best, lower_bound_s=min(bound, best.seconds)))


def static(items: Items, alike: Iterable[Plan], allowed: Collection[str]) -> Plan:
    """Choose the fastest of several plans with one degree, once its groups are placed; they stay as they are.

    Args:
        items: as `plan`.
        alike: plans on the even machine, one at least.
        allowed: methods that other plans may choose from; the bound holds for all of them.
    """
    known = list(alike)
    ways = [items.kept(candidate) for way in known for candidate in (way, _rearranged(items, way))]
    best = min(ways, key=lambda way: way.seconds)
    bound = max(*(way.lower_bound_s for way in known), policies.bound(items.as_sequences, allowed))
    return replace(best, lower_bound_s=min(bound, best.seconds))


def improve(items: Items, plan: Plan, even: Plan, allowed: Collection[str], time_limit_s: float) -> Plan:
    """Make a plan faster by levelling, or by what was improved on the even machine; neither plan nor bound gets worse.

    Args:
        items: as `plan`.
        plan: of the uneven machine.
        even: the same, improved on the even machine.
        allowed: methods to choose from.
        time_limit_s: wall seconds to spend.
    """
    begun = [plan, *([_placed(items, even, allowed)] if even.micro_batches != plan.micro_batches else [])]
    candidates = [*begun]
    for way in begun:
        limit_s = time_limit_s / len(begun)
        candidates += _levelled(items, way, allowed, max(1, int(MOVES_A_SECOND * limit_s)), limit_s)
    best = min(candidates, key=lambda way: way.seconds)
    bound = max(plan.lower_bound_s, even.lower_bound_s)
    if best is plan:
        return replace(plan, lower_bound_s=min(bound, plan.seconds))
    return _ordered(items, replace(best, solver="annealing", lower_bound_s=min(bound, best.seconds)))


def as_even(items: Items, plan: Plan) -> Plan:
    """Return a plan of the uneven machine as one of the even machine, whose bound is not known."""
    seconds = items.as_sequences.cost.evened().plan_seconds(sequences_of(plan, items.lengths), items.as_sequences.batch)
    return replace(plan, seconds=seconds, lower_bound_s=0.0)


def smaller(cost: CostModel, num_ranks: int) -> CostModel:
    """Return the even machine with memory for as many tokens as slow ranks would compute: plans for it leave room.

    Where memory is full, nothing could be moved to the fast ranks.
    """
    share = sum(cost.rank_speeds.get(rank, 1.0) for rank in range(num_ranks)) / num_ranks
    free = cost.memory_bytes_per_rank - cost.model_state_bytes_per_rank
    # a token more than the share, so that there is one
    left = min(free, share * free + cost.activation_bytes_per_token)
    return replace(cost.evened(), memory_bytes_per_rank=cost.model_state_bytes_per_rank + left)


def num_fast(cost: CostModel, num_ranks: int) -> int:
    """Count the ranks that are worth their memory: a plan for these alone leaves the others what is moved there."""
    return sum(cost.rank_speeds.get(rank, 1.0) >= WORTH_THEIR_MEMORY for rank in range(num_ranks))


def widened(plan: Plan, num_ranks: int) -> Plan:
    """Return a plan of some ranks as one of all, the others of which have nothing to do yet."""
    micro_batches = (filled([group for group in m.groups if group.samples], num_ranks) for m in plan.micro_batches)
    return replace(plan, num_ranks=num_ranks, micro_batches=tuple(micro_batches))


def _rearranged(items: Items, plan: Plan, arrangement: Arrangement = arranged) -> Plan:
    """Give the groups of a plan their places."""
    problem = items.as_sequences
    return placed(plan, sequences_of(plan, items.lengths), problem.cost, problem.batch, arrangement)


def _placed(items: Items, plan: Plan, allowed: Collection[str], arrangement: Arrangement = arranged) -> Plan:
    """Give the groups of a plan their places, their fastest methods there, and the plan its seconds."""
    return items.priced(_rearranged(items, plan, arrangement), allowed)


def _levelled(
    items: Items, plan: Plan, allowed: Collection[str], num_moves: int, time_limit_s: float = math.inf
) -> Iterator[Plan]:
    """Move samples as if groups exchanged heads, and as if no exchange took time, where methods have their say."""
    cost = items.as_sequences.cost
    machines = [cost, cost.with_free_exchange()] if methods.has_choice(cost, allowed) else [cost]
    squares = [float(sum(n * n for n in item)) for item in items.lengths]
    for machine in machines:
        moves, limit_s = max(1, num_moves // len(machines)), time_limit_s / len(machines)
        if (moved := levelled(items.as_samples, plan, machine, squares, moves, limit_s)) is not None:
            yield items.priced(moved, allowed)
            yield _placed(items, moved, allowed)


def _ordered(items: Items, plan: Plan) -> Plan:
    """Have the slowest micro-batches run first, as on any machine."""
    cost, lengths = items.as_sequences.cost, items.as_sequences.batch
    held = sequences_of(plan, items.lengths).micro_batches
    seconds = [max(cost.group_seconds(group, lengths) for group in m.groups) for m in held]
    order = sorted(range(len(held)), key=lambda number: -seconds[number])
    return replace(plan, micro_batches=tuple(plan.micro_batches[number] for number in order))
