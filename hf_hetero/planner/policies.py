"""Plans whose groups may do something to hold more tokens, made of plans whose groups all do alike.

A micro-batch does not wait for another, so a plan of some samples and a plan of the others are a plan of all. And a
group may always do less than it was planned with, if its tokens still fit: `methods.with_methods` sees to that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hf_hetero.costs import CostModel
from hf_hetero.errors import InfeasibleBatch
from hf_hetero.plan import Group, MicroBatch, Plan
from hf_hetero.planner.bound import lower_bound
from hf_hetero.planner.methods import with_methods
from hf_hetero.planner.problem import make_problem

if TYPE_CHECKING:
    from hf_hetero.planner.planner import Planner

MOST_SPLITS = 3
"""Micro-batches, at most, that are tried as those which do the most to hold more tokens."""


def plan_with(planner: Planner, lengths: Sequence[int]) -> Plan:
    """The best of several plans, each group of which does what it must to hold its tokens, and no more.

    One was made as if holding more tokens took no time, and its bound holds whatever groups do; others as if all groups
    did the same, or as if only those of some micro-batches did the most.
    """
    cost = planner.cost_model
    at_best = _on(planner, cost.with_free_memory()).plan(lengths)
    if not lengths:
        return at_best
    made_by = [at_best]
    for under in cost.by_activations.values():
        if max(lengths) <= _room(planner, under):
            made_by.append(_on(planner, under).plan(lengths))
    made_by += _in_two(planner, made_by[-1], lengths)
    allowed = planner.methods if planner.has_choice else ("ulysses",)
    found = [with_methods(cost, made, lengths, allowed) for made in made_by]
    best = replace(min(found, key=lambda made: made.seconds), lower_bound_s=at_best.lower_bound_s)
    return planner.improve(best, lengths) if planner.solver == "mip" else best


def static_with(planner: Planner, lengths: Sequence[int], degree: int | None) -> Plan:
    """The best plan in which all groups have one degree and do the same to hold their tokens."""
    found: list[Plan] = []
    refused: InfeasibleBatch | None = None
    for activations, cost in planner.cost_model.by_activations.items():
        try:
            plan = _on(planner, cost).static(lengths, degree)
        except InfeasibleBatch as error:
            refused = error
        else:
            found.append(_doing(plan, activations))
    if not found:
        assert refused is not None
        raise refused
    free = make_problem(planner.cost_model.with_free_memory(), planner.num_ranks, planner.max_degree, lengths)
    return replace(min(found, key=lambda plan: plan.seconds), lower_bound_s=lower_bound(free))


def improved_with(planner: Planner, plan: Plan, lengths: Sequence[int]) -> Plan:
    """The plan improved as one of groups that do nothing to hold more tokens; as it is, where some do."""
    if any(group.activations for group in plan.groups):
        return plan
    better = replace(planner, cost_model=planner.cost_model.by_activations[None]).improve(plan, lengths)
    return replace(better, lower_bound_s=plan.lower_bound_s)  # what was proven holds without policies only


def _in_two(planner: Planner, plan: Plan, lengths: Sequence[int]) -> Iterator[Plan]:
    """Plans of which a part does the most to hold more tokens, and the other part is planned without that.

    Args:
        planner: of the whole.
        plan: of groups that all do the most. Its slowest micro-batches are one part, or else just the samples that
            nothing less holds.
        lengths: tokens of each sample.
    """
    cost, most = planner.cost_model, planner.cost_model.leanest
    *simpler, _ = cost.by_activations
    less = replace(cost, activation_policies={n: p for n, p in cost.activation_policies.items() if n in simpler})
    slowest_first = sorted(plan.micro_batches, key=lambda m: -max(most.group_seconds(g, lengths) for g in m.groups))
    parts = [slowest_first[:number] for number in range(1, min(len(slowest_first), MOST_SPLITS + 1))]
    room = _room(planner, less.leanest)
    if longer := [sample for sample, length in enumerate(lengths) if length > room]:
        parts.append(_of_samples(_on(planner, most).plan([lengths[sample] for sample in longer]), longer))
    for part in parts:
        taken = {sample for micro_batch in part for group in micro_batch.groups for sample in group.samples}
        others = [sample for sample in range(len(lengths)) if sample not in taken]
        if others and max(lengths[sample] for sample in others) <= room:
            rest = _on(planner, less).plan([lengths[sample] for sample in others])
            yield replace(plan, micro_batches=(*part, *_of_samples(rest, others)))


def _on(planner: Planner, cost: CostModel) -> Planner:
    """A planner for a machine like this one."""
    return replace(planner, cost_model=cost, solver="fast")


def _room(planner: Planner, cost: CostModel) -> int:
    """Tokens of the longest sample that some degree holds."""
    return cost.capacity_tokens * planner.degrees[-1]


def _of_samples(plan: Plan, samples: Sequence[int]) -> list[MicroBatch]:
    """A plan's micro-batches where its samples are these of a larger batch; methods and policies are left open."""
    return [
        MicroBatch(tuple(Group(g.ranks, tuple(samples[s] for s in g.samples)) for g in m.groups))
        for m in plan.micro_batches
    ]


def _doing(plan: Plan, activations: str | None) -> Plan:
    """The plan with all groups that hold samples doing the same."""
    micro_batches = tuple(
        MicroBatch(tuple(replace(g, activations=activations) if g.samples else g for g in m.groups))
        for m in plan.micro_batches
    )
    return replace(plan, micro_batches=micro_batches)
