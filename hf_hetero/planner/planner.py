"""The planner: a batch of lengths in, a plan out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from hf_hetero.cost_model import CostModel
from hf_hetero.errors import ConfigError
from hf_hetero.plan import Plan
from hf_hetero.planner.bound import lower_bound
from hf_hetero.planner.draft import draft_seconds, to_plan
from hf_hetero.planner.fast import fast_draft
from hf_hetero.planner.homogeneous import best_homogeneous
from hf_hetero.planner.problem import Problem, make_problem

Solver = Literal["auto", "fast", "mip"]


@dataclass(frozen=True)
class Planner:
    """Splits each global batch into micro-batches, ranks into groups, and samples among them.

    Args:
        cost_model: seconds and memory of a group.
        num_ranks: ranks of the run.
        max_degree: largest number of ranks that may share a sample; None means all that the cost model offers.
        solver: "fast" searches; "mip" also runs an integer program within its limit; "auto" is "fast".
        mip_time_limit_s: wall seconds that the integer program may take for one batch.

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

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise ConfigError(f"Planner.num_ranks is {self.num_ranks!r}: it must be a positive integer.")
        if self.max_degree is not None and self.max_degree < 1:
            raise ConfigError(f"Planner.max_degree is {self.max_degree!r}: it must be None or a positive integer.")
        if self.solver not in get_args(Solver):
            raise ConfigError(f"Planner.solver is {self.solver!r}: it must be one of {', '.join(get_args(Solver))}.")
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
        problem = make_problem(self.cost_model, self.num_ranks, self.max_degree, lengths)
        plan = self._fast(problem)
        return replace(plan, planning_s=time.perf_counter() - started)

    def improve(self, plan: Plan, lengths: Sequence[int]) -> Plan:
        """The better of a plan and what the integer program finds within its limit.

        Raises:
            BadSample, InfeasibleBatch: as `plan`.
        """
        make_problem(self.cost_model, self.num_ranks, self.max_degree, lengths)
        return plan

    def _fast(self, problem: Problem) -> Plan:
        """The better of the fast search and the best plan with one degree."""
        if not problem.lengths:
            return Plan(problem.num_ranks, ())
        bound = lower_bound(problem)
        mixed = fast_draft(problem)
        below_s = draft_seconds(problem, mixed) if mixed is not None else float("inf")
        static = best_homogeneous(problem, below_s)
        if static is not None:
            return to_plan(problem, static, "homogeneous", bound)
        assert mixed is not None  # some degree holds every sample, so that one of them exists
        return to_plan(problem, mixed, "fast", bound)
