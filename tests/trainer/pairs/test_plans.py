"""Plans of pairs: both samples side by side in one group, whichever planner has made them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import LENGTHS
from planner.reference import problems, small_cost

from hf_hetero import CostModel, Plan, Planner
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


BY_HAND = CostModel(
    attention_s_per_token2=0.01,
    linear_s_per_token=0.1,
    micro_batch_s=1.0,
    all_to_all_bytes_per_token=3.0,
    all_to_all_bytes_per_s={2: 60.0},  # so that a token which is shared takes 0.05 s more
    all_to_all_latency_s={2: 0.5},
    activation_bytes_per_token=1.0,
    model_state_bytes_per_rank=0.0,
    memory_bytes_per_rank=8.0,
)
TWO_PAIRS = (4, 2, 3, 3)


def test_static_runs_of_pairs_by_hand() -> None:
    """A pair a rank, or both on both ranks; squares are those of samples. A degree that holds no whole pair is out."""
    found = PlansOfPairs(Planner(BY_HAND, 2)).static_seconds(TWO_PAIRS)
    alone_s = 1 + 0.01 * (16 + 4) + 0.1 * 6
    shared_s = 1 + 0.5 + (0.01 * (16 + 4 + 9 + 9) + 0.15 * 12) / 2
    assert found == pytest.approx({1: alone_s, 2: shared_s})
    assert set(PlansOfPairs(Planner(BY_HAND, 2)).static_seconds((6, 3, 1, 1))) == {2}  # 9 tokens, where a rank holds 8


def test_static_runs_of_unpaired_by_hand() -> None:
    """Mismatched samples count half; a degree must hold them, and those that are learned."""
    found = PlansOfUnpaired(Planner(BY_HAND, 2)).static_seconds(TWO_PAIRS)
    alone_s = 0.5 * (1 + 0.01 * 9 + 0.1 * 3) + 1 + 0.01 * 16 + 0.1 * 4
    shared_s = 0.5 * (1.5 + (0.01 * (4 + 9) + 0.15 * 5) / 2) + 1.5 + (0.01 * (16 + 9) + 0.15 * 7) / 2
    assert found == pytest.approx({1: alone_s, 2: shared_s})
    for lengths in ((9, 2, 3, 3), (4, 9, 3, 3)):
        assert set(PlansOfUnpaired(Planner(BY_HAND, 2)).static_seconds(lengths)) == {2}


@pytest.mark.parametrize("kind", [PlansOfPairs, PlansOfUnpaired])
def test_static_runs_that_are_not_known(kind: type) -> None:
    """A source that tells none is no failure; one in another process tells what one here does."""
    planner = Planner(COST, 4)
    assert kind(PlansOfThisProcess(lambda: planner)).static_seconds(LENGTHS) == {}
    elsewhere = kind(planned_elsewhere(lambda: planner, False))
    try:
        assert elsewhere.static_seconds(LENGTHS) == kind(planner).static_seconds(LENGTHS) != {}
    finally:
        elsewhere.close()
