"""Plans of preferences: both samples of a pair stay in one group of one micro-batch; mismatched ones come first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_hetero.data.plan_sources import Comparing, PlanSource
from hf_hetero.data.planning import Planners
from hf_hetero.plan import Group, MicroBatch, Plan
from hf_hetero.planner.draft import with_each_group
from hf_hetero.planner.items import sequences_of

FORWARD_SHARE = 0.5
"""What mismatched samples take of the time in which as many are learned: both go through the model and its reference,
forward, and back through the model, which takes as long as twice forward, only what is learned."""


@dataclass(frozen=True, slots=True)
class PlansOfPairs:
    """`PlansOfPairs` is a source of plans of samples of which the first two are a pair, the next two, and so on.

    Args:
        source: plans items, as `Planner` does.
    """

    source: Any

    def plan(self, lengths: Sequence[int]) -> Plan:
        """Plan pairs; the samples of the plan are those of `lengths`."""
        return sequences_of(self.source.plan(pairs_of(lengths)), pairs_of(lengths))

    def static(self, lengths: Sequence[int]) -> Plan:
        """Plan pairs simply."""
        return sequences_of(self.source.static(pairs_of(lengths)), pairs_of(lengths))

    def improve(self, plan: Plan, lengths: Sequence[int]) -> Plan:
        """Improve a plan of this source."""
        return sequences_of(self.source.improve(_by_pair(plan), pairs_of(lengths)), pairs_of(lengths))

    def static_seconds(self, lengths: Sequence[int]) -> dict[int, float]:
        """Return the seconds of pairs in runs with one degree, by degree; nothing where the source does not know."""
        return self.source.static_seconds(pairs_of(lengths)) if isinstance(self.source, Comparing) else {}

    def close(self) -> None:
        """Close the source, if it holds anything."""
        if hasattr(self.source, "close"):
            self.source.close()


@dataclass(frozen=True, slots=True)
class PlannersOfPairs(Planners):
    """`PlannersOfPairs` makes planners of pairs as the user's settings say."""

    def for_training(self, reproducible: bool) -> PlanSource:
        """Return a source of plans from processes of their own."""
        return PlansOfPairs(Planners.for_training(self, reproducible))

    def for_evaluation(self) -> PlanSource:
        """Return a source of plans from this process."""
        return PlansOfPairs(Planners.for_evaluation(self))


@dataclass(frozen=True, slots=True)
class PlansOfUnpaired:
    """`PlansOfUnpaired` is a source of plans of samples of which every second one is mismatched.

    These are planned apart, and come first: what is learned of the others needs to know of all of them.

    Args:
        source: plans samples, as `Planner` does.
    """

    source: Any

    def plan(self, lengths: Sequence[int]) -> Plan:
        """Plan a step; the samples of the plan are those of `lengths`."""
        return _one_after_the_other(self.source.plan(lengths[1::2]), self.source.plan(lengths[::2]))

    def static(self, lengths: Sequence[int]) -> Plan:
        """Plan a step simply."""
        return _one_after_the_other(self.source.static(lengths[1::2]), self.source.static(lengths[::2]))

    def improve(self, plan: Plan, lengths: Sequence[int]) -> Plan:
        """Return the plan as it is: of its seconds, it does not say which are those of mismatched samples."""
        return plan

    def static_seconds(self, lengths: Sequence[int]) -> dict[int, float]:
        """Return the seconds of both parts of a step in runs with one degree, for each degree that holds all samples.

        Nothing where the source does not know them.
        """
        if not isinstance(self.source, Comparing):
            return {}
        compared, learned = (self.source.static_seconds(lengths[start::2]) for start in (1, 0))
        return {d: FORWARD_SHARE * s + learned[d] for d, s in compared.items() if d in learned}

    def close(self) -> None:
        """Close the source, if it holds anything."""
        if hasattr(self.source, "close"):
            self.source.close()


@dataclass(frozen=True, slots=True)
class PlannersOfUnpaired(Planners):
    """`PlannersOfUnpaired` makes planners of completions, and of mismatched ones, as the user's settings say."""

    def for_training(self, reproducible: bool) -> PlanSource:
        """Return a source of plans from processes of their own, which have nothing to improve."""
        return PlansOfUnpaired(Planners.for_training(self, reproducible=True))

    def for_evaluation(self) -> PlanSource:
        """Return a source of plans from this process."""
        return PlansOfUnpaired(Planners.for_evaluation(self))


def _one_after_the_other(compared: Plan, learned: Plan) -> Plan:
    """Join the plans of mismatched samples, and of the others, into one of both, whose samples alternate."""

    def of(plan: Plan, first: int) -> tuple[MicroBatch, ...]:
        groups = (
            [replace(g, samples=tuple(first + 2 * n for n in g.samples)) for g in m.groups] for m in plan.micro_batches
        )
        return tuple(MicroBatch(tuple(own)) for own in groups)

    return replace(
        learned,
        micro_batches=(*of(compared, 1), *of(learned, 0)),
        seconds=FORWARD_SHARE * compared.seconds + learned.seconds,
        lower_bound_s=FORWARD_SHARE * compared.lower_bound_s + learned.lower_bound_s,
        planning_s=compared.planning_s + learned.planning_s,
    )


def pairs_of(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the lengths of pairs, from those of their samples, pair after pair."""
    return list(zip(lengths[::2], lengths[1::2], strict=True))


def _by_pair(plan: Plan) -> Plan:
    """Name the samples of a plan by pair."""

    def of(group: Group) -> Group:
        return replace(group, samples=tuple(sample // 2 for sample in group.samples[::2]))

    return with_each_group(plan, of)
