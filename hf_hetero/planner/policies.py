"""The top layer lets groups do something to hold more tokens, recompute or offload, if the cost model offers that.

Its plans are made of plans whose groups all do alike, which the layer below makes. A micro-batch does not wait for
another, so a plan of some samples and a plan of the others are a plan of all. And a group may always do less than it
was planned with, if its tokens still fit: `methods.with_methods` sees to that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from hf_hetero.costs import CostModel
from hf_hetero.plan import Group, MicroBatch, Plan
from hf_hetero.planner import basic, methods
from hf_hetero.planner.basic import Search
from hf_hetero.planner.draft import to_plan, with_each_group
from hf_hetero.planner.problem import Problem, refuse_too_long
from hf_hetero.planner.search.homogeneous import homogeneous

MOST_SPLITS = 3
"""Micro-batches, at most, that are tried as those which do the most to hold more tokens. Half: ±0.0 %, CPU -3 %;
double: ±0.0 %, CPU -3 % (policies)."""


def plan(problem: Problem, search: Search, allowed: Collection[str]) -> Plan:
    """Choose the fastest of several plans, each group of which does what it must, and bound them all.

    Args:
        allowed: methods to choose from.
    """
    if len(problem.cost.by_activations) == 1:
        return methods.plan(problem, search, allowed)
    quick = replace(quickest(problem, allowed), lower_bound_s=bound(problem, allowed))
    return improve(problem, quick, search, allowed) if search.solver == "mip" else quick


def quickest(problem: Problem, allowed: Collection[str]) -> Plan:
    """Find the plan that `plan` begins with; its bound is left to the caller.

    Each group does what it must to hold its tokens, and no more. One candidate is made as if holding more tokens took
    no time; others as if all groups did the same, or as if only those of some micro-batches did the most.
    """
    cost = problem.cost
    if len(cost.by_activations) == 1:
        return methods.quickest(problem, allowed)
    unhindered = methods.quickest(problem.priced_by(cost.with_free_memory()), allowed)
    alike = [way for way in map(problem.priced_by, cost.by_activations.values()) if way.holds_longest]
    candidates = [unhindered, *(methods.quickest(way, allowed) for way in alike)]
    candidates += _in_two(problem, candidates[-1], allowed)
    thrifty = [methods.with_methods(cost, candidate, problem.batch, allowed) for candidate in candidates]
    return min(thrifty, key=lambda plan: plan.seconds)


def bound(problem: Problem, allowed: Collection[str]) -> float:
    """Return seconds below which no plan is, whatever its groups do, and whichever of these methods they choose."""
    return methods.bound(problem.priced_by(problem.cost.with_free_memory()), allowed)


def static(problem: Problem, degree: int | None = None, allowed: Collection[str] = ("ulysses",)) -> Plan:
    """Find the best plan in which all groups have one degree, exchange heads, and do the same to hold their tokens.

    Args:
        degree: of all groups; None: whichever is fastest.
        allowed: methods that other plans may choose from; the bound holds for all of them.

    Raises:
        InfeasibleBatch: a sample that groups of this degree cannot hold, whatever they do.
    """
    cost = problem.cost
    if len(cost.by_activations) == 1:
        return replace(basic.static(problem, degree), lower_bound_s=bound(problem, allowed))
    ways = {activations: problem.priced_by(under) for activations, under in cost.by_activations.items()}
    most = problem.degrees[-1] if degree is None else degree
    holding = {activations: way for activations, way in ways.items() if problem.lengths[0] <= way.capacity * most}
    if not holding:
        return basic.static(problem.priced_by(cost.leanest), degree)  # which says what it holds, and refuses
    alike = [_doing(basic.static(way, degree), activations) for activations, way in holding.items()]
    return replace(min(alike, key=lambda plan: plan.seconds), lower_bound_s=bound(problem, allowed))


def statics(problem: Problem) -> dict[int, Plan]:
    """Return the best plan with each degree that holds the longest sample, ascending: those of `static`, unbounded."""
    found: dict[int, tuple[Plan, str | None]] = {}
    for activations, under in problem.cost.by_activations.items():
        way = problem.priced_by(under)
        for degree in way.degrees:
            if (draft := homogeneous(way, degree)) is not None:
                plan = to_plan(way, draft, "homogeneous", 0.0)
                if degree not in found or plan.seconds < found[degree][0].seconds:
                    found[degree] = plan, activations
    return {degree: _doing(plan, activations) for degree, (plan, activations) in sorted(found.items())}


def improve(problem: Problem, plan: Plan, search: Search, allowed: Collection[str]) -> Plan:
    """Make a plan faster, or its bound higher; neither gets worse.

    Half of the time holding more tokens is free, which is when bounds are proven, too; half of it micro-batches whose
    groups do the same are improved among themselves. Then each group does as little as its tokens allow.

    Raises:
        InfeasibleBatch: a micro-batch holds a sample that nothing its groups do makes room for.
    """
    cost = problem.cost
    if len(cost.by_activations) == 1:
        return methods.improve(problem, plan, search, allowed)
    half = replace(search, mip_time_limit_s=search.mip_time_limit_s / 2)
    apart = _improved_apart(problem, plan, half, allowed)
    free = problem.priced_by(cost.with_free_memory())
    as_free = methods.with_methods(free.cost, plan, problem.batch, allowed)
    unhindered = methods.improve(free, as_free, half, allowed)
    thrifty = [methods.with_methods(cost, way, problem.batch, allowed) for way in (apart, unhindered)]
    best = min((plan, *thrifty), key=lambda way: way.seconds)
    return replace(best, lower_bound_s=min(max(plan.lower_bound_s, unhindered.lower_bound_s), best.seconds))


def _improved_apart(problem: Problem, plan: Plan, search: Search, allowed: Collection[str]) -> Plan:
    """Improve micro-batches that do the same, each such part for a share of the time; methods are left open."""
    cost, doing = problem.cost, list(problem.cost.by_activations)
    parts: dict[str | None, list[MicroBatch]] = {}
    for micro_batch in plan.micro_batches:
        most = max((group.activations for group in micro_batch.groups), key=doing.index)
        parts.setdefault(most, []).append(micro_batch)
    share = replace(search, mip_time_limit_s=search.mip_time_limit_s / len(parts))
    improved: list[MicroBatch] = []
    for activations, micro_batches in parts.items():
        samples = sorted(sample for m in micro_batches for group in m.groups for sample in group.samples)
        part = problem.of(samples).priced_by(cost.by_activations[activations])
        refuse_too_long(part)
        number = {sample: i for i, sample in enumerate(samples)}
        alone = tuple(
            MicroBatch(tuple(Group(g.ranks, tuple(number[sample] for sample in g.samples)) for g in m.groups))
            for m in micro_batches
        )
        start = methods.with_methods(part.cost, Plan(plan.num_ranks, alone, solver=plan.solver), part.batch, allowed)
        improved += _renamed(methods.improve(part, start, share, allowed, proves=False), samples)
    return replace(plan, micro_batches=tuple(improved))


def _in_two(problem: Problem, lean: Plan, allowed: Collection[str]) -> Iterator[Plan]:
    """Make plans of which a part does the most to hold more tokens, and the other part is planned without that.

    Args:
        lean: a plan of groups that all do the most. Its slowest micro-batches are one part, or else just the samples
            that nothing less holds.
    """
    most, less = problem.cost.leanest, _without_most(problem.cost)
    lengths, room = problem.batch, less.leanest.capacity_tokens * problem.degrees[-1]
    slowest_first = sorted(lean.micro_batches, key=lambda m: -max(most.group_seconds(g, lengths) for g in m.groups))
    parts = [slowest_first[:number] for number in range(1, min(len(slowest_first), MOST_SPLITS + 1))]
    if longer := [sample for sample, length in enumerate(lengths) if length > room]:
        parts.append(_renamed(methods.quickest(problem.of(longer).priced_by(most), allowed), longer))
    for part in parts:
        taken = {sample for micro_batch in part for group in micro_batch.groups for sample in group.samples}
        others = [sample for sample in range(len(lengths)) if sample not in taken]
        if others and max(lengths[sample] for sample in others) <= room:
            rest = quickest(problem.of(others).priced_by(less), allowed)  # there is one policy less
            yield replace(lean, micro_batches=(*part, *_renamed(rest, others)))


def _without_most(cost: CostModel) -> CostModel:
    """Take from a machine what holds the most tokens; its groups may do anything else."""
    *simpler, _ = cost.by_activations
    offered = {name: policy for name, policy in cost.activation_policies.items() if name in simpler}
    return replace(cost, activation_policies=offered)


def _renamed(plan: Plan, samples: Sequence[int]) -> list[MicroBatch]:
    """Name a plan's samples as those of a larger batch; methods and policies are left open."""
    return [
        MicroBatch(tuple(Group(g.ranks, tuple(samples[s] for s in g.samples)) for g in m.groups))
        for m in plan.micro_batches
    ]


def _doing(plan: Plan, activations: str | None) -> Plan:
    """Have all groups of a plan that hold samples do the same."""
    return with_each_group(plan, lambda g: replace(g, activations=activations) if g.samples else g)
