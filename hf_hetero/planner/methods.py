"""How attention crosses each group of a plan, and what the group does to hold its tokens: the fastest that fits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from hf_hetero.costs import CostModel
from hf_hetero.plan import Group, MicroBatch, Plan


def with_methods(cost: CostModel, plan: Plan, lengths: Sequence[int], allowed: Collection[str]) -> Plan:
    """The same groups, each in its fastest way: no slower than as planned, for groups do not wait within one.

    Args:
        cost: knows the methods, and what groups may do to hold more tokens.
        plan: whose groups fit the memory in some way.
        lengths: tokens of each sample of the global batch.
        allowed: methods to choose from; a group that none of them fits exchanges heads.
    """

    def fastest(group: Group) -> Group:
        return min(_ways(cost, group, lengths, allowed), key=lambda way: cost.group_seconds(way, lengths))

    micro_batches = tuple(MicroBatch(tuple(map(fastest, m.groups))) for m in plan.micro_batches)
    chosen = replace(plan, micro_batches=micro_batches)
    return replace(chosen, seconds=cost.plan_seconds(chosen, lengths))


def _ways(cost: CostModel, group: Group, lengths: Sequence[int], allowed: Collection[str]) -> list[Group]:
    """Those that fit; of equally fast ones, the first does least."""
    tokens = sum(lengths[sample] for sample in group.samples)
    found: list[Group] = []
    for activations, under in cost.by_activations.items():
        if tokens <= under.capacity_tokens * group.degree:
            ways = under.methods(group, lengths)
            ways = [way for way in ways if way.method in allowed] or ways[:1]
            found += [replace(way, activations=activations) for way in ways]
    return found
