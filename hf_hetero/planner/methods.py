"""Which method carries attention across each group of a plan: the fastest of those that fit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from hf_hetero.cost_model import CostModel
from hf_hetero.plan import Group, MicroBatch, Plan


def with_methods(cost: CostModel, plan: Plan, lengths: Sequence[int], allowed: Collection[str]) -> Plan:
    """The same groups, each by its fastest method: the plan is as fast or faster, for groups do not wait within one.

    Args:
        cost: knows the methods.
        plan: whose groups exchange heads, if in any way.
        lengths: tokens of each sample of the global batch.
        allowed: methods to choose from; a group that none of them fits exchanges heads.
    """

    def fastest(group: Group) -> Group:
        ways = cost.methods(group, lengths)
        ways = [way for way in ways if way.method in allowed] or ways[:1]
        return min(ways, key=lambda way: cost.group_seconds(way, lengths))

    micro_batches = tuple(MicroBatch(tuple(map(fastest, m.groups))) for m in plan.micro_batches)
    chosen = replace(plan, micro_batches=micro_batches)
    return replace(chosen, seconds=cost.plan_seconds(chosen, lengths))
