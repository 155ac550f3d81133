"""A plan in the making: which degree each group has and which samples it holds, before ranks are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hf_hetero.plan import Group, MicroBatch, Plan
from hf_hetero.planner.problem import Problem

DraftGroup = tuple[int, list[int]]
"""Degree of a group, and the samples it holds."""
DraftMicroBatch = list[DraftGroup]
Draft = list[DraftMicroBatch]


def micro_batch_seconds(problem: Problem, groups: DraftMicroBatch) -> float:
    """Seconds of the slowest group; ranks without a group count as groups of degree 1 without samples."""
    return max((problem.group_seconds(degree, samples) for degree, samples in groups), default=problem.fixed_s[0])


def draft_seconds(problem: Problem, draft: Draft) -> float:
    """Seconds of a step."""
    return sum(micro_batch_seconds(problem, groups) for groups in draft)


def to_plan(problem: Problem, draft: Draft, solver: str, lower_bound_s: float) -> Plan:
    """Name the ranks. Slow micro-batches first, large groups first; ranks left over form groups of degree 1.

    Raises:
        HeteroError: the draft breaks a law of `Plan`.
    """
    slowest_first = sorted(draft, key=lambda groups: (-micro_batch_seconds(problem, groups), groups))
    plan = Plan(problem.num_ranks, tuple(_named(problem, groups) for groups in slowest_first))
    seconds = problem.cost.plan_seconds(plan, problem.batch)
    return replace(plan, seconds=seconds, lower_bound_s=lower_bound_s, solver=solver)


def from_plan(problem: Problem, plan: Plan) -> Draft:
    """Inverse of `to_plan`: the groups that hold samples."""
    position = {sample: position for position, sample in enumerate(problem.order)}
    draft = [
        [(group.degree, sorted(position[s] for s in group.samples)) for group in micro_batch.groups if group.samples]
        for micro_batch in plan.micro_batches
    ]
    return [groups for groups in draft if groups]


def _named(problem: Problem, groups: DraftMicroBatch) -> MicroBatch:
    named: list[Group] = []
    start = 0
    for degree, samples in sorted(groups, key=lambda group: (-group[0], sorted(group[1]))):
        ranks = tuple(range(start, start + degree))
        named.append(Group(ranks, tuple(problem.order[sample] for sample in sorted(samples))))
        start += degree
    named += [Group((rank,), ()) for rank in range(start, problem.num_ranks)]
    return MicroBatch(tuple(named))


def tiling(num_ranks: int, degree: int, degrees: Sequence[int]) -> list[int]:
    """Degrees of a micro-batch of groups of one degree; what is left over is filled with the largest smaller ones."""
    tiles: list[int] = []
    for smaller in sorted((d for d in degrees if d <= degree), reverse=True):
        tiles += [smaller] * ((num_ranks - sum(tiles)) // smaller)
    return tiles
