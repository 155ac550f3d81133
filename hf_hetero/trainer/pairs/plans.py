"""Pairs are planned as items: both samples of a pair stay in one group of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_hetero.data.plan_sources import PlanSource
from hf_hetero.data.planning import Planners
from hf_hetero.plan import Group, MicroBatch, Plan
from hf_hetero.planner.items import sequences_of


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


def pairs_of(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the lengths of pairs, from those of their samples, pair after pair."""
    return list(zip(lengths[::2], lengths[1::2], strict=True))


def _by_pair(plan: Plan) -> Plan:
    """Name the samples of a plan by pair."""

    def of(group: Group) -> Group:
        return replace(group, samples=tuple(sample // 2 for sample in group.samples[::2]))

    return replace(plan, micro_batches=tuple(MicroBatch(tuple(map(of, m.groups))) for m in plan.micro_batches))
