"""Levelling moves samples between groups that stand where they stand, until slow ranks have less to do than fast ones.

Each group of a plan is a kind of its own (`improve.energy`), with the seconds of its place: samples change groups, and
groups change samples, as where whole plans are annealed, but ranks and micro-batches stay. Moves end by count, so that
the same batch gets the same plan.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hf_hetero.costs import CostModel
from hf_hetero.plan import Group, MicroBatch, Plan
from hf_hetero.planner.improve.annealing import POWERS, Moves, cooled
from hf_hetero.planner.improve.energy import DraftState, Kinds
from hf_hetero.planner.problem import Problem


def levelled(
    problem: Problem,
    plan: Plan,
    cost: CostModel,
    squares: Sequence[float],
    num_moves: int,
    time_limit_s: float = math.inf,
) -> Plan | None:
    """Return a plan whose samples changed groups, or None where no change made it faster; methods are left open.

    Args:
        problem: the batch.
        plan: where to begin; its groups fit the memory.
        cost: what moves are priced by, as if all groups exchanged heads.
        squares: of the tokens of each sample, in the caller's order.
        num_moves, time_limit_s: how long to try.
    """
    slots = [(number, group) for number, m in enumerate(plan.micro_batches) for group in m.groups if group.samples]
    position = {sample: position for position, sample in enumerate(problem.order)}
    draft: list[list[tuple[int, list[int]]]] = [[] for _ in plan.micro_batches]
    for slot, (number, group) in enumerate(slots):
        draft[number].append((slot, [position[sample] for sample in group.samples]))
    by_position = [squares[sample] for sample in problem.order]
    chance = random.Random(0).random
    state = DraftState(problem, draft, POWERS[0], _kinds([group for _, group in slots], cost), by_position)
    best = cooled(state, Moves(state, chance).in_place(), chance, num_moves, time_limit_s)
    if best is None:
        return None
    held = {slot: tuple(problem.order[p] for p in samples) for groups in best for slot, samples in groups}
    return _with_samples(plan, held)


def _kinds(groups: Sequence[Group], cost: CostModel) -> Kinds:
    """Make a kind of each group: its degree, its place, and what it does to hold more tokens."""
    prices = [cost.of_group(group) for group in groups]
    degrees = [group.degree for group in groups]
    priced = list(zip(prices, degrees, strict=True))
    return Kinds(
        names=range(len(groups)),
        degrees=degrees,
        capacity=[under.capacity_tokens * degree for under, degree in priced],
        fixed_s=[under.fixed_s(degree) for under, degree in priced],
        attention_s=[under.attention_s_per_token2 / degree for under, degree in priced],
        linear_s=[under.linear_s(degree) / degree for under, degree in priced],
    )


def _with_samples(plan: Plan, held: Mapping[int, tuple[int, ...]]) -> Plan:
    """Give the groups of a plan that hold samples others; ranks of a group that has none left stand alone.

    Args:
        plan: whose groups are changed.
        held: number of a group, counted over those of the plan that hold samples -> its samples.
    """
    micro_batches: list[MicroBatch] = []
    slot = 0
    for micro_batch in plan.micro_batches:
        groups: list[Group] = []
        for group in micro_batch.groups:
            samples = held.get(slot, ()) if group.samples else ()
            slot += bool(group.samples)
            groups += [replace(group, samples=samples)] if samples else [Group((rank,), ()) for rank in group.ranks]
        if any(group.samples for group in groups):
            micro_batches.append(MicroBatch(tuple(groups)))
    return replace(plan, micro_batches=tuple(micro_batches))
