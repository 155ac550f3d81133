"""The planner: a batch of lengths in, a plan out."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from hf_hetero.costs import CostModel
from hf_hetero.errors import ConfigError, InfeasibleBatch
from hf_hetero.plan import METHODS, Plan
from hf_hetero.planner import policies
from hf_hetero.planner.bound import lower_bound
from hf_hetero.planner.draft import Draft, draft_seconds, from_plan, to_plan
from hf_hetero.planner.fast import fast_draft
from hf_hetero.planner.homogeneous import best_homogeneous, homogeneous
from hf_hetero.planner.methods import with_methods
from hf_hetero.planner.problem import Problem, make_problem, usable_degrees
from hf_hetero.planner.program import Backend

Solver = Literal["auto", "fast", "mip"]
MOST_RANKS = 1 << 20
"""A plan names every rank."""


@dataclass(frozen=True)
class Planner:
    """Splits each global batch into micro-batches, ranks into groups, and samples among them.

    Args:
        cost_model: seconds and memory of a group.
        num_ranks: ranks of the run.
        max_degree: largest number of ranks that may share a sample; None means all that the cost model offers.
        solver: "fast" searches; "mip" also improves what it found; "auto" leaves that to a caller with time.
        mip_time_limit_s: wall seconds that an improvement may take for one batch.
        mip_backend: who solves the integer programs, "highs" or "cbc".
        methods: how attention may cross the ranks of a group, of those that the cost model knows.

    Raises:
        ConfigError: a setting is out of range.

    >>> from hf_hetero.planner import Planner  # doctest: +SKIP
    >>> plan = Planner(CostModel.load("cost.json"), num_ranks=8).plan([4096, 1024, 512])  # doctest: +SKIP
    """

    cost_model: CostModel
    num_ranks: int
    max_degree: int | None = None
    solver: Solver = "auto"
    mip_time_limit_s: float = 2.0
    mip_backend: Backend = "highs"
    methods: Sequence[str] = METHODS

    def __post_init__(self) -> None:
        if not _positive_integer(self.num_ranks):
            raise ConfigError(f"Planner.num_ranks is {self.num_ranks!r}: it must be a positive integer.")
        if self.num_ranks > MOST_RANKS:
            raise ConfigError(f"Planner.num_ranks is {self.num_ranks!s:.60}: it must be at most {MOST_RANKS:,}.")
        if self.max_degree is not None and not _positive_integer(self.max_degree):
            raise ConfigError(f"Planner.max_degree is {self.max_degree!r}: it must be None or a positive integer.")
        if self.solver not in get_args(Solver):
            raise ConfigError(f"Planner.solver is {self.solver!r}: it must be one of {', '.join(get_args(Solver))}.")
        if self.mip_backend not in get_args(Backend):
            raise ConfigError(
                f"Planner.mip_backend is {self.mip_backend!r}: it must be {' or '.join(get_args(Backend))}."
            )
        if not self.methods or not set(self.methods) <= set(METHODS):
            raise ConfigError(f"Planner.methods is {self.methods!r}: choose from {', '.join(METHODS)}.")
        if not self.mip_time_limit_s > 0:
            raise ConfigError(f"Planner.mip_time_limit_s is {self.mip_time_limit_s!r}: it must be above 0.")

    def plan(self, lengths: Sequence[int]) -> Plan:
        """The plan of one step.

        Args:
            lengths: tokens of each sample of the global batch.

        Raises:
            BadSample: a length that is not a whole number of tokens from 1 to 2**40.
            InfeasibleBatch: a sample that no degree can hold.
        """
        started = time.perf_counter()
        if len(self.cost_model.by_activations) > 1:
            plan = policies.plan_with(self, lengths)
        else:
            problem = make_problem(self.cost_model, self.num_ranks, self.max_degree, lengths)
            if not problem.lengths:
                return Plan(problem.num_ranks, ())
            plan = self._planned(problem)
            if self.has_choice:
                plan = self._with_methods(plan, problem, lengths)
        return replace(plan, planning_s=time.perf_counter() - started)

    @property
    def has_choice(self) -> bool:
        """Whether methods have their say: groups may exchange something else, or heads that do not divide."""
        cost = self.cost_model
        return cost.kv_bytes_per_token is not None and (set(self.methods) != {"ulysses"} or cost.num_heads is not None)

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees that plans may use, ascending."""
        return usable_degrees(self.cost_model, self.num_ranks, self.max_degree)

    def static(self, lengths: Sequence[int], degree: int | None = None) -> Plan:
        """The plan of a run with one degree: this one, or the best for these samples.

        Raises:
            BadSample: as `plan`.
            ConfigError: a degree that the cost model lacks, or that cannot tile the ranks.
            InfeasibleBatch: a sample that no degree, or not this one, can hold.
        """
        if len(self.cost_model.by_activations) > 1:
            return policies.static_with(self, lengths, degree)
        started = time.perf_counter()
        if degree is not None and degree not in self.degrees:
            raise ConfigError(
                f"Degree {degree!r} is not offered on {self.num_ranks} ranks: choose one of "
                f"{', '.join(map(str, self.degrees))}, or add its bandwidth to the cost model."
            )
        problem = make_problem(self.cost_model, self.num_ranks, self.max_degree, lengths)
        if not problem.lengths:
            return Plan(problem.num_ranks, ())
        draft = best_homogeneous(problem) if degree is None else homogeneous(problem, degree)
        if draft is None:
            raise InfeasibleBatch(
                f"Degree {degree} holds {problem.capacity * (degree or 1)} tokens a group; the longest sample has "
                f"{problem.lengths[0]}. Choose a larger degree."
            )
        plan = to_plan(problem, draft, "homogeneous", lower_bound(problem))
        return replace(plan, planning_s=time.perf_counter() - started)

    def improve(self, plan: Plan, lengths: Sequence[int]) -> Plan:
        """What integer programs make of a plan of these lengths within their limit: never slower, never a lower bound.

        Raises:
            BadSample, InfeasibleBatch: as `plan`.
            ConfigError: the plan is for other samples or ranks.
        """
        if len(self.cost_model.by_activations) > 1:
            return policies.improved_with(self, plan, lengths)
        started = time.perf_counter()
        problem = make_problem(self.cost_model, self.num_ranks, self.max_degree, lengths)
        if (plan.num_ranks, plan.num_samples) != (self.num_ranks, len(problem.lengths)):
            raise ConfigError(
                f"The plan is for {plan.num_samples} samples on {plan.num_ranks} ranks; "
                f"it cannot be improved for {len(problem.lengths)} samples on {self.num_ranks}."
            )
        seconds = self.cost_model.plan_seconds(plan, lengths)
        if not math.isclose(seconds, plan.seconds, rel_tol=1e-9):
            raise ConfigError(
                f"The plan takes {plan.seconds} s; with these lengths and this cost model it would take {seconds} s. "
                "Improve a plan with the lengths and the cost model that it was made for."
            )
        if not problem.lengths:
            return plan
        better = (
            self._improved_with_methods(problem, plan, lengths) if self.has_choice else self._improved(problem, plan)
        )
        return replace(better, planning_s=plan.planning_s + time.perf_counter() - started)

    def _planned(self, problem: Problem) -> Plan:
        """The best plan whose groups exchange heads, and its bound."""
        draft, found_by = _fast(problem)
        plan = to_plan(problem, draft, found_by, lower_bound(problem))
        return self._improved(problem, plan) if self.solver == "mip" else plan

    def _with_methods(self, plan: Plan, problem: Problem, lengths: Sequence[int]) -> Plan:
        """The best of several plans, each with the fastest method for each of its groups.

        One was made as if all groups exchanged heads, the other as if no exchange took time. The truth is between, and
        the bound of the second holds whatever the methods. Both take heads for divisible; where they are not at large
        degrees, a third does without those. Those with one degree are tried, too: none of them shall be faster.
        """
        free = Planner(self.cost_model.with_free_exchange(), self.num_ranks, self.max_degree, self.solver)
        at_best = replace(free, mip_time_limit_s=self.mip_time_limit_s, mip_backend=self.mip_backend).plan(lengths)
        made_by = [plan, at_best]
        even = [degree for degree in problem.degrees if self.cost_model.head_imbalance(degree) == 1]
        if len(even) < len(problem.degrees) and problem.lengths[0] <= problem.capacity * even[-1]:
            fewer = make_problem(self.cost_model.with_degrees(even), self.num_ranks, self.max_degree, lengths)
            made_by.append(to_plan(fewer, *_fast(fewer), at_best.lower_bound_s))
        for degree in problem.degrees:
            if (draft := homogeneous(problem, degree)) is not None:
                made_by.append(to_plan(problem, draft, "homogeneous", at_best.lower_bound_s))
        found = [with_methods(self.cost_model, made, lengths, self.methods) for made in made_by]
        return replace(min(found, key=lambda made: made.seconds), lower_bound_s=at_best.lower_bound_s)

    def _improved_with_methods(self, problem: Problem, plan: Plan, lengths: Sequence[int]) -> Plan:
        """A plan that is as fast or faster: improved as if its groups exchanged heads, then with methods."""
        by_heads = to_plan(problem, from_plan(problem, plan), plan.solver, 0.0)
        better = with_methods(self.cost_model, self._improved(problem, by_heads), lengths, self.methods)
        return replace(better, lower_bound_s=plan.lower_bound_s) if better.seconds < plan.seconds else plan

    def _improved(self, problem: Problem, plan: Plan) -> Plan:
        """A plan that is as fast or faster, and a bound that is as high or higher."""
        from hf_hetero.planner.improve import improve  # it needs the solvers, which planning does not

        draft = from_plan(problem, plan)
        found = improve(problem, draft, plan.lower_bound_s, self.mip_time_limit_s, self.mip_backend)
        if found.solver is not None:
            return to_plan(problem, found.draft, found.solver, found.bound)
        return replace(plan, lower_bound_s=found.bound)


def _positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _fast(problem: Problem) -> tuple[Draft, str]:
    """The better of the fast search and the best plan with one degree, and who found it."""
    mixed = fast_draft(problem)
    below_s = draft_seconds(problem, mixed) if mixed is not None else float("inf")
    static = best_homogeneous(problem, below_s)
    if static is not None:
        return static, "homogeneous"
    assert mixed is not None  # the largest degree holds every sample, so that one of them exists
    return mixed, "fast"
