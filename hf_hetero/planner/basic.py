"""The lowest layer chooses who shares what with whom; its groups exchange heads, and recompute nothing.

The layers above give groups more freedom, one kind each, and are made of plans of this one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_hetero.config import Backend, Solver
from hf_hetero.errors import InfeasibleBatch
from hf_hetero.plan import Plan
from hf_hetero.planner.bound import lower_bound
from hf_hetero.planner.draft import Draft, draft_seconds, from_plan, to_plan
from hf_hetero.planner.improve.improve import improve_draft, search_draft
from hf_hetero.planner.problem import Problem
from hf_hetero.planner.search.fast import fast_draft
from hf_hetero.planner.search.homogeneous import best_homogeneous, homogeneous


@dataclass(frozen=True, slots=True)
class Search:
    """A search says how long, and by what, a batch is planned.

    Args:
        solver: "mip" improves each plan at once; "fast" and "auto" do not.
        mip_time_limit_s: wall seconds of one improvement.
        mip_backend: who solves its integer programs.
    """

    solver: Solver
    mip_time_limit_s: float
    mip_backend: Backend


def plan(problem: Problem, search: Search) -> Plan:
    """Find a good plan whose groups exchange heads, no slower than any with one degree, and a bound for all of them."""
    quick = replace(quickest(problem), lower_bound_s=lower_bound(problem))
    return improve(problem, quick, search) if search.solver == "mip" else quick


def quickest(problem: Problem) -> Plan:
    """Find the plan that `plan` begins with; its bound is left to the caller, who may know a better one."""
    return to_plan(problem, *draft_and_solver(problem), 0.0)


def static(problem: Problem, degree: int | None = None) -> Plan:
    """Plan as a run with one degree does: with this one, or with the best for these samples.

    Raises:
        InfeasibleBatch: a sample that groups of this degree cannot hold.
    """
    draft = best_homogeneous(problem) if degree is None else homogeneous(problem, degree)
    if draft is None:
        raise InfeasibleBatch(
            f"Degree {degree} holds {problem.capacity * (degree or 1)} tokens a group; the longest sample has "
            f"{problem.lengths[0]}. Choose a larger degree."
        )
    return to_plan(problem, draft, "homogeneous", lower_bound(problem))


def improve(problem: Problem, plan: Plan, search: Search, proves: bool = True) -> Plan:
    """Make a plan faster, or its bound higher, within the limit; neither gets worse.

    Args:
        proves: whether a part of the time is for the bound.
    """
    spend, draft = improve_draft if proves else search_draft, from_plan(problem, plan)
    improved = spend(problem, draft, plan.lower_bound_s, search.mip_time_limit_s, search.mip_backend)
    if improved.solver is not None:
        return to_plan(problem, improved.draft, improved.solver, improved.bound)
    return replace(plan, lower_bound_s=improved.bound)


def draft_and_solver(problem: Problem) -> tuple[Draft, str]:
    """Choose between the fast search's draft and the best one with one degree; say who drew it, too."""
    mixed = fast_draft(problem)
    # one degree is searched second, so that degrees which cannot beat the mixed draft are left aside
    below_s = draft_seconds(problem, mixed) if mixed is not None else float("inf")
    one_degree = best_homogeneous(problem, below_s)
    if one_degree is not None:
        return one_degree, "homogeneous"
    assert mixed is not None  # the largest degree holds every sample, so that one of them exists
    return mixed, "fast"
