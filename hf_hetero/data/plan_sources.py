"""Plans come from a source: a planner in this process, planners in processes of their own, or whatever a user has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from hf_hetero.costs.out_of_memory import fits
from hf_hetero.costs.planned_lengths import planned_lengths
from hf_hetero.plan import Plan
from hf_hetero.planner import Planner, PlannerProcess
from hf_hetero.planner.items import Lengths, flat, sequences_of

PLANNING_NICENESS = 5
IMPROVING_NICENESS = 19


class PlanSource(Protocol):
    """A plan source gives a run its plans: a `Planner` is one, and so is whatever asks planners elsewhere.

    `plan` and `static` are called in one thread, `improve` in another, maybe at the same time. A source that has a
    method `close` is closed when no more plans are wanted.
    """

    def plan(self, lengths: Sequence[int], /) -> Plan:
        """Return the plan of a global batch, from the tokens of each of its samples.

        Raises:
            HeteroError: the batch itself cannot be planned.
        """
        ...

    def static(self, lengths: Sequence[int], /) -> Plan:
        """Return a simple plan of the batch; asked for when `plan` fails for another reason than the batch."""
        ...

    def improve(self, plan: Plan, lengths: Sequence[int], /) -> Plan:
        """Return a plan of these lengths that is no slower than `plan`, or `plan`; called while there is time."""
        ...


@runtime_checkable
class Closeable(Protocol):
    """A `Closeable` source holds what must be given back, such as processes."""

    def close(self) -> None:
        """Give it back."""
        ...


@runtime_checkable
class Comparing(Protocol):
    """A `Comparing` source also knows what runs with one degree would take, for a number in the log."""

    def static_seconds(self, lengths: Lengths, /) -> dict[int, float]:
        """Return the seconds of a batch, by degree, for each degree that holds its samples."""
        ...


@runtime_checkable
class Seeing(Protocol):
    """A `Seeing` source also knows what text takes as long as a sample with images; it is given that to plan."""

    def planned_lengths(self, lengths: Sequence[int], tower_tokens: Sequence[float], /) -> tuple[int, ...]:
        """Return the planned length of each sample, from its tokens and its tower tokens."""
        ...


@dataclass(frozen=True, slots=True)
class PlansOfThisProcess:
    """`PlansOfThisProcess` is a source that plans in the thread that asks, and improves nothing.

    Args:
        planner: asked anew for each plan.
    """

    planner: Callable[[], Planner]

    def plan(self, lengths: Lengths) -> Plan:
        """Plan as `Planner.plan`."""
        return self.planner().plan(lengths)

    def static(self, lengths: Lengths) -> Plan:
        """Plan as `Planner.static`."""
        return self.planner().static(lengths)

    def improve(self, plan: Plan, lengths: Lengths) -> Plan:
        """Return the plan as it is."""
        return plan

    def planned_lengths(self, lengths: Sequence[int], tower_tokens: Sequence[float]) -> tuple[int, ...]:
        """Return planned lengths by the cost model of now."""
        return _planned_lengths(self.planner(), lengths, tower_tokens)


@dataclass(frozen=True, slots=True)
class PlansOfProcesses:
    """`PlansOfProcesses` is a source of two processes: one plans, the other improves and yields to all else.

    Args:
        planner: asked anew for each plan.
        planning: plans.
        improving: improves plans; None: they stay as they are.
    """

    planner: Callable[[], Planner]
    planning: PlannerProcess
    improving: PlannerProcess | None

    def plan(self, lengths: Lengths) -> Plan:
        """Plan as `PlannerProcess.plan`."""
        return self.planning.plan(lengths)

    def static(self, lengths: Lengths) -> Plan:
        """Plan as `Planner.static`, in this process: it is asked when the other one has failed."""
        return self.planner().static(lengths)

    def improve(self, plan: Plan, lengths: Lengths) -> Plan:
        """Improve as `PlannerProcess.improve`; a plan that was made before times were refitted stays as it is."""
        if self.improving is None:
            return plan
        # `Planner.improve` refuses a plan of another cost model; after a refit, or less memory, that is no failure
        cost, by_sequence, tokens = self.planner().cost_model, sequences_of(plan, lengths), flat(lengths)
        is_of_this_model = math.isclose(cost.plan_seconds(by_sequence, tokens), plan.seconds, rel_tol=1e-9)
        is_of_this_model = is_of_this_model and (not cost.ran_out or fits(cost, by_sequence, tokens))
        return self.improving.improve(plan, lengths) if is_of_this_model else plan

    def static_seconds(self, lengths: Lengths) -> dict[int, float]:
        """Tell the seconds of runs with one degree as `PlannerProcess.static_seconds`."""
        return self.planning.static_seconds(lengths)

    def planned_lengths(self, lengths: Sequence[int], tower_tokens: Sequence[float]) -> tuple[int, ...]:
        """Return planned lengths by the cost model of now, in this process: it is a formula."""
        return _planned_lengths(self.planner(), lengths, tower_tokens)

    def close(self) -> None:
        """End both processes."""
        self.planning.close()
        if self.improving is not None:
            self.improving.close()


def _planned_lengths(planner: Planner, lengths: Sequence[int], tower_tokens: Sequence[float]) -> tuple[int, ...]:
    cost = planner.cost_model
    return planned_lengths(cost, cost.leanest.capacity_tokens * planner.degrees[-1], lengths, tower_tokens)


def planned_elsewhere(planner: Callable[[], Planner], improves: bool, limit_s: float = 60.0) -> PlansOfProcesses:
    """Return a source of plans from two processes, which start when they are first asked.

    Args:
        planner: asked anew for each plan.
        improves: whether plans are improved while there is time.
        limit_s: seconds that a plan, or an improvement, may take.
    """
    return PlansOfProcesses(
        planner,
        planning=PlannerProcess(planner, PLANNING_NICENESS, limit_s),
        improving=PlannerProcess(planner, IMPROVING_NICENESS, limit_s) if improves else None,
    )
