"""The planner takes a batch of lengths, and returns a plan.

It checks the batch, once, and hands it to the top layer, `policies`; each layer calls only those below. On a machine
whose ranks are not alike, what the layers plan as if they were is where `uneven` begins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import cast, get_args

from hf_hetero.config import DEFAULT_METHODS
from hf_hetero.costs import CostModel
from hf_hetero.errors import ConfigError, InfeasibleBatch
from hf_hetero.plan import METHODS, Plan
from hf_hetero.planner import items, methods, policies
from hf_hetero.planner.basic import Search, Solver
from hf_hetero.planner.improve.program import Backend
from hf_hetero.planner.items import Items, Lengths, has_items, make_items, sequences_of
from hf_hetero.planner.problem import Problem, make_problem, usable_degrees
from hf_hetero.planner.uneven import uneven

MOST_RANKS = 1 << 20
"""Ranks, at most: a plan names every one of them, so that a mistyped number would fill the memory."""


@dataclass(frozen=True)
class Planner:
    """A `Planner` splits each global batch into micro-batches, ranks into groups, and samples among them.

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
    methods: Sequence[str] = DEFAULT_METHODS

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

    def plan(self, lengths: Lengths) -> Plan:
        """Plan one step.

        Args:
            lengths: tokens of each sample of the global batch; a tuple has those of sequences that stay together, such
                as a pair, in one group of one micro-batch. A sample of the plan is a position in `lengths`.

        Raises:
            BadSample: a length that is not a whole number of tokens from 1 to 2**40.
            InfeasibleBatch: a sample that no degree can hold.
        """
        started = time.perf_counter()
        if len(lengths) == 0:  # an array has no truth of its own
            return Plan(self.num_ranks, ())
        if self.cost_model.is_uneven:
            plan = self._uneven_plan(lengths)
        elif has_items(lengths):
            plan = items.plan(self._items(lengths), self._search, self.methods)
        else:
            plan = policies.plan(self._checked(lengths), self._search, self.methods)
        return replace(plan, planning_s=time.perf_counter() - started)

    @property
    def has_choice(self) -> bool:
        """Tell whether methods have their say: groups may exchange something else, or heads that do not divide."""
        return methods.has_choice(self.cost_model, self.methods)

    @property
    def degrees(self) -> tuple[int, ...]:
        """List the degrees that plans may use, ascending."""
        return usable_degrees(self.cost_model, self.num_ranks, self.max_degree)

    def static(self, lengths: Lengths, degree: int | None = None) -> Plan:
        """Plan a step as a run with one degree does: this one, or the best for these samples.

        Args:
            lengths: as `plan`.
            degree: of all groups; None: the best.

        Raises:
            BadSample: as `plan`.
            ConfigError: a degree that the cost model lacks, or that cannot tile the ranks.
            InfeasibleBatch: a sample that no degree, or not this one, can hold.
        """
        started = time.perf_counter()
        if degree is not None and degree not in self.degrees:
            raise ConfigError(
                f"Degree {degree!r} is not offered on {self.num_ranks} ranks: choose one of "
                f"{', '.join(map(str, self.degrees))}, or add its bandwidth to the cost model."
            )
        if len(lengths) == 0:  # an array has no truth of its own
            return Plan(self.num_ranks, ())
        if self.cost_model.is_uneven:
            even = self._even_statics(lengths).values() if degree is None else [self._evened.static(lengths, degree)]
            plan = uneven.static(self._items(lengths), even, self.methods)
        elif has_items(lengths):
            plan = items.static(self._items(lengths), degree, self.methods)
        else:
            plan = policies.static(self._checked(lengths), degree, self.methods)
        return replace(plan, planning_s=time.perf_counter() - started)

    def static_seconds(self, lengths: Lengths) -> dict[int, float]:
        """Return the seconds of a step as a run with one degree plans it, for each degree that holds the samples.

        Args:
            lengths: as `plan`.

        Raises:
            BadSample, InfeasibleBatch: as `plan`.
        """
        if len(lengths) == 0:  # an array has no truth of its own
            return {}
        if self.cost_model.is_uneven:
            batch, even = self._items(lengths), self._even_statics(lengths)
            return {degree: uneven.static(batch, [way], self.methods).seconds for degree, way in even.items()}
        if has_items(lengths):
            alike = items.static_plans(self._items(lengths))
        else:
            alike = policies.statics(self._checked(lengths))
        return {degree: way.seconds for degree, way in alike.items()}

    def improve(self, plan: Plan, lengths: Lengths) -> Plan:
        """Improve a plan of these lengths, within the limit of its time; neither plan nor bound gets worse.

        Args:
            plan: of these lengths, by this planner.
            lengths: as `plan`.

        Raises:
            BadSample, InfeasibleBatch: as `plan`.
            ConfigError: the plan is for other samples or ranks.
        """
        started = time.perf_counter()
        if (plan.num_ranks, plan.num_samples) != (self.num_ranks, len(lengths)):
            raise ConfigError(
                f"The plan is for {plan.num_samples} samples on {plan.num_ranks} ranks; "
                f"it cannot be improved for {len(lengths)} samples on {self.num_ranks}."
            )
        if len(lengths) == 0:  # an array has no truth of its own
            return plan
        if self.cost_model.is_uneven or has_items(lengths):
            together = self._items(lengths)
            self._check_seconds(plan, sequences_of(plan, together.lengths), together.as_sequences.batch)
            if self.cost_model.is_uneven:
                better = self._improved(together, plan, lengths)
            else:
                better = items.improve(together, plan, self._search, self.methods)
        else:
            problem = self._checked(lengths)
            self._check_seconds(plan, plan, problem.batch)
            better = policies.improve(problem, plan, self._search, self.methods)
        return replace(better, planning_s=plan.planning_s + time.perf_counter() - started)

    def _check_seconds(self, plan: Plan, by_sequence: Plan, lengths: Sequence[int]) -> None:
        """Refuse a plan of other lengths or costs: its seconds and its bound would be carried on."""
        seconds = self.cost_model.plan_seconds(by_sequence, lengths)
        if not math.isclose(seconds, plan.seconds, rel_tol=1e-9):
            raise ConfigError(
                f"The plan takes {plan.seconds} s; with these lengths and this cost model it would take {seconds} s. "
                "Improve a plan with the lengths and the cost model that it was made for."
            )

    @property
    def _evened(self) -> Planner:
        """Return the planner for the machine if its ranks and links were alike."""
        return replace(self, cost_model=self.cost_model.evened())

    def _even_statics(self, lengths: Lengths) -> dict[int, Plan]:
        """Plan with each degree that holds the samples, as if ranks were alike."""
        longest, room = self._items(lengths).as_samples.lengths[0], self.cost_model.leanest.capacity_tokens
        return {d: self._evened.static(lengths, d) for d in self.degrees if longest <= room * d}

    def _uneven_plan(self, lengths: Lengths) -> Plan:
        """Plan for ranks that are not alike, from plans as if they were: with all degrees, with fewer, with one."""
        even, batch = replace(self._evened, solver="fast"), self._items(lengths)
        ignoring = even.plan(lengths)

        def others() -> Iterator[Plan]:
            yield from self._even_statics(lengths).values()
            largest = max(group.degree for group in ignoring.groups)
            machines = [replace(even, cost_model=uneven.smaller(self.cost_model, self.num_ranks))]
            machines += [replace(even, max_degree=largest // part) for part in (2, 4) if largest >= part]
            if 0 < (fast := uneven.num_fast(self.cost_model, self.num_ranks)) < self.num_ranks:
                most = min(self.max_degree or fast, 1 << fast.bit_length() - 1)  # of what can be placed among all ranks
                machines.append(replace(even, num_ranks=fast, max_degree=most))
            for planner in machines if len(lengths) <= uneven.MOST_REPLANNED else ():
                with suppress(InfeasibleBatch):
                    yield uneven.widened(planner.plan(lengths), self.num_ranks)

        plan = uneven.plan(batch, ignoring, others(), self.methods)
        return self._improved(batch, plan, lengths) if self.solver == "mip" else plan

    def _improved(self, batch: Items, plan: Plan, lengths: Lengths) -> Plan:
        """Improve a plan for ranks that are not alike: half of the time as if they were, which is when it is proven."""
        half_s = self.mip_time_limit_s / 2
        even = replace(self._evened, mip_time_limit_s=half_s).improve(uneven.as_even(batch, plan), lengths)
        return uneven.improve(batch, plan, even, self.methods, half_s)

    @property
    def _search(self) -> Search:
        """Return the settings that the layers below read."""
        return Search(self.solver, self.mip_time_limit_s, self.mip_backend)

    def _checked(self, lengths: Lengths) -> Problem:
        """Return a batch of samples as a problem, or refuse it."""
        return make_problem(self.cost_model, self.num_ranks, self.max_degree, cast("Sequence[int]", lengths))

    def _items(self, lengths: Lengths) -> Items:
        """Return a batch of items, or refuse it."""
        return make_items(self.cost_model, self.num_ranks, self.max_degree, lengths)


def _positive_integer(value: object) -> bool:
    """Tell whether a value is a whole number above 0, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
