"""A draft is a plan in the making: each group has its degree and its samples, but no ranks yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from hf_hetero.plan import Group, MicroBatch, Plan
from hf_hetero.planner.problem import Problem

DraftGroup = tuple[int, list[int]]
"""Degree of a group, and the samples it holds."""
DraftMicroBatch = list[DraftGroup]
Draft = list[DraftMicroBatch]


def micro_batch_seconds(problem: Problem, groups: DraftMicroBatch) -> float:
    """Return the seconds of the slowest group; ranks without one count as groups of degree 1 without samples."""
    return max((problem.group_seconds(degree, samples) for degree, samples in groups), default=problem.fixed_s[0])


def draft_seconds(problem: Problem, draft: Draft) -> float:
    """Return the seconds of a step."""
    return sum(micro_batch_seconds(problem, groups) for groups in draft)


def to_plan(problem: Problem, draft: Draft, solver: str, lower_bound_s: float) -> Plan:
    """Name the ranks: slow micro-batches first, large groups first; ranks left over form groups of degree 1.

    Samples of a group, and groups of a degree, come out sorted, in whatever order a search left them.

    Raises:
        HeteroError: the draft breaks a law of `Plan`.
    """
    slowest_first = sorted(draft, key=lambda groups: (-micro_batch_seconds(problem, groups), groups))
    plan = Plan(problem.num_ranks, tuple(_named(problem, groups) for groups in slowest_first))
    seconds = problem.cost.plan_seconds(plan, problem.batch)
    return replace(plan, seconds=seconds, lower_bound_s=lower_bound_s, solver=solver)


def from_plan(problem: Problem, plan: Plan) -> Draft:
    """Invert `to_plan`: keep the groups that hold samples, and name them by their position."""
    position = {sample: position for position, sample in enumerate(problem.order)}
    draft = [
        [(group.degree, sorted(position[s] for s in group.samples)) for group in micro_batch.groups if group.samples]
        for micro_batch in plan.micro_batches
    ]
    return [groups for groups in draft if groups]


def _named(problem: Problem, groups: DraftMicroBatch) -> MicroBatch:
    """Give groups their ranks, and samples their place in the caller's batch."""
    named: list[Group] = []
    start = 0
    # largest first: a group then starts at a sum of larger degrees, so at a multiple of its own (`usable_degrees`)
    for degree, samples in sorted(groups, key=lambda group: (-group[0], sorted(group[1]))):
        ranks = tuple(range(start, start + degree))
        named.append(Group(ranks, tuple(problem.order[sample] for sample in sorted(samples))))
        start += degree
    named += [Group((rank,), ()) for rank in range(start, problem.num_ranks)]
    return MicroBatch(tuple(named))


def with_each_group(plan: Plan, change: Callable[[Group], Group]) -> Plan:
    """Return the same plan, each of its groups changed; its seconds are for the caller to count anew."""
    return replace(plan, micro_batches=tuple(MicroBatch(tuple(map(change, m.groups))) for m in plan.micro_batches))


def tiling(num_ranks: int, degree: int, degrees: Sequence[int]) -> list[int]:
    """List the degrees of a micro-batch of groups of one degree; ranks left over get the largest smaller ones."""
    tiles: list[int] = []
    for smaller in sorted((d for d in degrees if d <= degree), reverse=True):
        tiles += [smaller] * ((num_ranks - sum(tiles)) // smaller)
    return tiles
