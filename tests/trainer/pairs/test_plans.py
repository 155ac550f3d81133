"""Plans of pairs: both samples side by side in one group, whichever planner has made them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import LENGTHS
from planner.reference import problems, small_cost

from hf_hetero import Plan, Planner
from hf_hetero.data.plan_sources import PlansOfThisProcess, planned_elsewhere
from hf_hetero.samples.pairs import check_together
from hf_hetero.trainer.pairs.plans import PlansOfPairs, PlansOfUnpaired

COST = small_cost(100, (2, 4))
ROWS = [row for row in range(len(LENGTHS) // 2) for _ in range(2)]


def check(plan: Plan) -> None:
    for group in plan.groups:
        check_together(ROWS, group.samples, group.ranks)
    assert problems(plan, LENGTHS, 4, COST) == []
    assert plan.seconds == pytest.approx(COST.plan_seconds(plan, LENGTHS), rel=1e-12)


def test_pairs_stay_together() -> None:
    """In plans, in simple ones, and in those that were improved, which are no slower."""
    source = PlansOfPairs(Planner(COST, 4))
    for plan in (source.plan(LENGTHS), source.static(LENGTHS)):
        check(plan)
        better = source.improve(plan, LENGTHS)
        check(better)
        assert better.seconds <= plan.seconds
    source.close()


def test_other_processes_plan_pairs_alike() -> None:
    """What a planner elsewhere says of pairs is what one here says, improved or not."""
    planner = Planner(COST, 4)
    here, elsewhere = PlansOfPairs(PlansOfThisProcess(lambda: planner)), planned_elsewhere(lambda: planner, True)
    source = PlansOfPairs(elsewhere)
    plan = here.plan(LENGTHS)
    assert replace(source.plan(LENGTHS), planning_s=plan.planning_s) == plan
    better = source.improve(plan, LENGTHS)
    check(better)
    assert better.seconds <= plan.seconds
    source.close()
    with pytest.raises(RuntimeError, match="closed"):
        source.plan(LENGTHS)


def test_samples_alone_would_part_them() -> None:
    """A planner that knows nothing of pairs parts some, which is noticed."""
    plan = Planner(COST, 4).plan(LENGTHS)
    with pytest.raises(Exception, match="one half of the pair"):
        check(plan)


def test_mismatched_samples_come_first() -> None:
    """Every second sample is in the first micro-batches, forward only; each part is as it is planned alone."""
    planner = Planner(COST, 4)
    source = PlansOfUnpaired(planner)
    for plan in (source.plan(LENGTHS), source.static(LENGTHS)):
        assert problems(plan, LENGTHS, 4, COST) == []
        kinds = [{sample % 2 for group in m.groups for sample in group.samples} for m in plan.micro_batches]
        assert kinds == sorted(kinds, key=lambda kind: -max(kind))
        assert all(len(kind) == 1 for kind in kinds)
        assert source.improve(plan, LENGTHS) == plan
    apart = 0.5 * planner.plan(LENGTHS[1::2]).seconds + planner.plan(LENGTHS[::2]).seconds
    assert source.plan(LENGTHS).seconds == pytest.approx(apart, rel=1e-12)
    source.close()
