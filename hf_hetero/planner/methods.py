"""The middle layer lets attention cross each group in any way that fits.

Who shares what with whom comes from plans of the basic layer, made as if groups exchanged heads, or as if they need not
exchange at all; then each group takes its fastest way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter

from hf_hetero.costs import CostModel
from hf_hetero.plan import Group, MicroBatch, Plan
from hf_hetero.planner import basic
from hf_hetero.planner.basic import Search
from hf_hetero.planner.bound import lower_bound
from hf_hetero.planner.draft import from_plan, to_plan
from hf_hetero.planner.problem import Problem
from hf_hetero.planner.search.homogeneous import homogeneous


def has_choice(cost: CostModel, allowed: Collection[str]) -> bool:
    """Tell whether this layer has a say: groups may exchange something else, or heads that do not divide."""
    return cost.kv_bytes_per_token is not None and (set(allowed) != {"ulysses"} or cost.num_heads is not None)


def bound(problem: Problem, allowed: Collection[str]) -> float:
    """Return seconds below which no plan is, whichever of these methods its groups choose."""
    if has_choice(problem.cost, allowed):
        problem = problem.priced_by(problem.cost.with_free_exchange())
    return lower_bound(problem)


def plan(problem: Problem, search: Search, allowed: Collection[str]) -> Plan:
    """Choose the fastest of several plans, each with the fastest method for each of its groups, and bound them all.

    Args:
        allowed: methods to choose from.
    """
    if not has_choice(problem.cost, allowed):
        return basic.plan(problem, search)
    quick = replace(quickest(problem, allowed), lower_bound_s=bound(problem, allowed))
    return improve(problem, quick, search, allowed) if search.solver == "mip" else quick


def quickest(problem: Problem, allowed: Collection[str]) -> Plan:
    """Find the plan that `plan` begins with; its bound is left to the caller.

    One candidate is made as if all groups exchanged heads, one as if no exchange took time: the truth is between.
    """
    if not has_choice(problem.cost, allowed):
        return basic.quickest(problem)
    by_heads = basic.quickest(problem)
    unhindered = basic.quickest(problem.priced_by(problem.cost.with_free_exchange()))
    candidates = [by_heads, unhindered, *_with_even_heads(problem), *_with_one_degree(problem)]
    crossing = [with_methods(problem.cost, candidate, problem.batch, allowed) for candidate in candidates]
    return min(crossing, key=lambda plan: plan.seconds)


def improve(problem: Problem, plan: Plan, search: Search, allowed: Collection[str], proves: bool = True) -> Plan:
    """Make a plan faster, or its bound higher; neither gets worse.

    Half of the time its groups exchange heads, half of it no exchange takes time; then methods have their say. What is
    proven in the second half holds whatever the methods.

    Args:
        allowed: methods to choose from.
        proves: whether a part of the time is for the bound.
    """
    if not has_choice(problem.cost, allowed):
        return basic.improve(problem, plan, search, proves)
    half = replace(search, mip_time_limit_s=search.mip_time_limit_s / 2)
    free = problem.priced_by(problem.cost.with_free_exchange())
    by_heads = basic.improve(problem, _priced(problem, plan), half, proves=False)
    unhindered = basic.improve(free, _priced(free, plan), half, proves)
    crossing = [with_methods(problem.cost, way, problem.batch, allowed) for way in (by_heads, unhindered)]
    best = min((plan, *crossing), key=lambda way: way.seconds)
    return replace(best, lower_bound_s=min(max(plan.lower_bound_s, unhindered.lower_bound_s), best.seconds))


def with_methods(cost: CostModel, plan: Plan, lengths: Sequence[int], allowed: Collection[str]) -> Plan:
    """Let each group of a plan take its fastest way: no slower than as planned, for groups do not wait for each other.

    Args:
        cost: knows the methods, and what groups may do to hold more tokens.
        plan: whose groups fit the memory in some way.
        lengths: tokens of each sample of the global batch; a `Batch` knows those of its groups that were priced before.
        allowed: methods to choose from; a group that none of them fits exchanges heads.
    """
    micro_batches: list[MicroBatch] = []
    seconds = 0.0
    for micro_batch in plan.micro_batches:
        ways = [min(_ways(cost, group, lengths, allowed), key=itemgetter(0)) for group in micro_batch.groups]
        micro_batches.append(MicroBatch(tuple(group for _, group in ways)))
        seconds += max(group_s for group_s, _ in ways)
    return replace(plan, micro_batches=tuple(micro_batches), seconds=seconds)


def _priced(problem: Problem, plan: Plan) -> Plan:
    """Name a plan's groups again, as such that exchange heads on this problem's machine; the bound stays."""
    return to_plan(problem, from_plan(problem, plan), plan.solver, plan.lower_bound_s)


def _with_even_heads(problem: Problem) -> Iterator[Plan]:
    """Plan without the degrees that do not divide the heads, which the basic layer takes for divisible."""
    even = [degree for degree in problem.degrees if problem.cost.head_imbalance(degree) == 1]
    if len(even) < len(problem.degrees):
        fewer = problem.priced_by(problem.cost.with_degrees(even))
        if fewer.holds_longest:
            yield to_plan(fewer, *basic.draft_and_solver(fewer), 0.0)


def _with_one_degree(problem: Problem) -> Iterator[Plan]:
    """Plan with each degree: a run with one degree may choose its methods, too, and shall be no faster."""
    for degree in problem.degrees:
        draft = homogeneous(problem, degree)
        if draft is not None:
            yield to_plan(problem, draft, "homogeneous", 0.0)


def _ways(
    cost: CostModel, group: Group, lengths: Sequence[int], allowed: Collection[str]
) -> Iterator[tuple[float, Group]]:
    """List the ways that fit, with their seconds; of equally fast ones, the first does least."""
    tokens = sum(lengths[sample] for sample in group.samples)
    for activations, under in cost.by_activations.items():
        if tokens <= under.capacity_tokens * group.degree:
            ways = under.methods(group, lengths)
            ways = [way for way in ways if way.method in allowed] or ways[:1]
            for way in ways:
                yield under.group_seconds(way, lengths), replace(way, activations=activations) if activations else way
