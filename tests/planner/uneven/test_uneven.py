"""Laws of plans on machines whose ranks or links are not alike."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planner.reference import SHARED, problems, small_cost
from planner.uneven.speeds import best_of_all_s, judged_seconds, uneven_batches

from hf_hetero.costs import ActivationPolicy, CostModel
from hf_hetero.plan import METHODS, Plan
from hf_hetero.planner import Planner, planner
from hf_hetero.planner.bound import lower_bound
from hf_hetero.planner.items import flat, sequences_of
from hf_hetero.planner.problem import make_problem
from hf_hetero.planner.process import PlannerProcess

some = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
Batch = tuple[list[int], int, CostModel]


@some
@given(uneven_batches(), st.randoms())
def test_never_slower_than_to_ignore_the_speeds(batch: Batch, order: random.Random) -> None:
    """Bound <= seconds <= those of the plan that knows of no speeds, and of each degree; seconds are the judge's."""
    lengths, num_ranks, cost = batch
    ours = Planner(cost, num_ranks)
    plan, ignoring = ours.plan(lengths), Planner(cost.evened(), num_ranks).plan(lengths)
    assert problems(plan, lengths, num_ranks, cost) == []
    seconds = judged_seconds(plan.to_dict(), lengths, cost.to_dict())
    assert plan.seconds == pytest.approx(seconds, rel=1e-9)
    assert plan.lower_bound_s <= seconds * (1 + 1e-9)
    assert seconds <= judged_seconds(ignoring.to_dict(), lengths, cost.to_dict()) * (1 + 1e-9)
    for degree, static_s in ours.static_seconds(lengths).items():
        static = ours.static(lengths, degree)
        assert static.seconds == pytest.approx(static_s)
        assert static.seconds == pytest.approx(judged_seconds(static.to_dict(), lengths, cost.to_dict()), rel=1e-9)
        assert seconds <= static.seconds * (1 + 1e-9)
    assert ours.plan(order.sample(lengths, len(lengths))).seconds == plan.seconds


@settings(max_examples=60, deadline=None)
@given(uneven_batches(max_ranks=4, max_samples=5))
def test_no_plan_is_below_the_bound(batch: Batch) -> None:
    """On batches small enough to try every plan at every place: none is faster than the bound, and ours is not far."""
    lengths, num_ranks, cost = batch
    best_s = best_of_all_s(lengths, num_ranks, cost)
    plan = Planner(cost, num_ranks).plan(lengths)
    assert plan.lower_bound_s <= best_s * (1 + 1e-9)
    assert best_s * (1 - 1e-9) <= plan.seconds <= best_s * 2


def test_a_bound_that_is_too_high_would_be_noticed() -> None:
    """A negative control: by the slow rank's speed for all the bound is wrong, and without speeds it is lower."""
    cost = replace(small_cost(100, (2,)), rank_speeds={0: 0.5})
    lengths = [50, 50, 50]
    best_s = best_of_all_s(lengths, 2, cost)
    known = lower_bound(make_problem(cost, 2, None, lengths))
    slow = replace(cost, rank_speeds={0: 0.5, 1: 0.5})
    assert lower_bound(make_problem(cost.evened(), 2, None, lengths)) < known * 0.95
    assert known <= best_s < lower_bound(make_problem(slow, 2, None, lengths))


def test_the_area_bound_by_hand() -> None:
    """Three ranks' worth of four: samples that fill them in proportion are planned to the bound."""
    cost = replace(small_cost(100, (), micro_batch_s=1.0, attention_s_per_token2=0.0), rank_speeds={0: 0.5, 3: 0.5})
    lengths = [10] * 12
    plan = Planner(cost, 4).plan(lengths)
    assert plan.lower_bound_s == pytest.approx(1 + 120 / 3)
    assert plan.seconds == pytest.approx(plan.lower_bound_s)
    loads = {group.ranks: len(group.samples) for group in plan.micro_batches[0].groups}
    assert loads == {(0,): 2, (1,): 4, (2,): 4, (3,): 2}


def test_ranks_that_are_hardly_there_may_be_left_out() -> None:
    """Where memory would put a sample on a rank at a tenth of the speed, two micro-batches without it are faster."""
    cost = small_cost(100, (), micro_batch_s=1.0, attention_s_per_token2=0.0)
    plan = Planner(replace(cost, rank_speeds={0: 0.1}), 4).plan([100] * 4)
    assert plan.seconds == pytest.approx(2 * 101)
    assert not [group for group in plan.groups if group.samples and 0 in group.ranks]


def test_links_decide_who_shares() -> None:
    """A pair of ranks with a slow link between them leaves the sample that must be shared to the other pair."""
    cost = small_cost(100, (2,), all_to_all_bytes_per_token=10.0)
    for slow, sharing in ((1, (2, 3)), (3, (0, 1))):
        plan = Planner(replace(cost, link_speeds={slow: 0.1}), 4).plan([150])
        assert next(group.ranks for group in plan.groups if group.samples) == sharing


@pytest.mark.parametrize("changes", [{}, {"rank_speeds": {}}, {"rank_speeds": {}, "link_speeds": {}}])
def test_without_speeds_nothing_of_it_runs(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A cost model without them is planned as before, to the digest and the bit."""
    lengths = [150, 99, 80, 60, 60, 31, 7] * 5
    before = Planner(small_cost(), 8).plan(lengths)

    def never(*_: object) -> Plan:
        raise AssertionError("the uneven layer was asked")

    for name in ("plan", "static", "improve"):
        monkeypatch.setattr(planner.uneven, name, never)
    ours = Planner(CostModel.from_dict({**small_cost().to_dict(), **changes}), 8)
    plan = ours.plan(lengths)
    assert (plan.digest(), plan.seconds, plan.lower_bound_s) == (before.digest(), before.seconds, before.lower_bound_s)
    assert ours.static(lengths).seconds >= plan.seconds
    assert ours.static_seconds(lengths)


def test_speeds_of_one_change_little() -> None:
    """Ranks that are listed, and are as fast as all others, are planned no worse than if they were not."""
    lengths = [150, 99, 80, 60, 60, 31, 7] * 5
    plan = Planner(replace(small_cost(), rank_speeds={0: 1.0}), 8).plan(lengths)
    assert plan.seconds <= Planner(small_cost(), 8).plan(lengths).seconds


@settings(max_examples=12, deadline=None)
@given(uneven_batches(max_ranks=8, max_samples=20), st.sampled_from(["auto", "mip"]))
def test_improving_makes_nothing_worse(batch: Batch, solver: Any) -> None:
    """Neither the plan nor its bound, which is still below it."""
    lengths, num_ranks, cost = batch
    quick = Planner(cost, num_ranks, mip_time_limit_s=0.05)
    plan = quick.plan(lengths)
    better = replace(quick, solver=solver).plan(lengths) if solver == "mip" else quick.improve(plan, lengths)
    assert problems(better, lengths, num_ranks, cost) == []
    assert better.seconds == pytest.approx(judged_seconds(better.to_dict(), lengths, cost.to_dict()), rel=1e-9)
    assert better.seconds <= plan.seconds * (1 + 1e-9)
    assert plan.lower_bound_s * (1 - 1e-9) <= better.lower_bound_s <= better.seconds * (1 + 1e-9)


def full_cost(**changes: Any) -> CostModel:
    """A machine with every method, and groups that may do something to hold more."""
    policy = ActivationPolicy(0.25, 1.5e-3, 1.5, exchanges=1.5)
    cost = small_cost(64, (2, 4, 8), micro_batch_s=5.0, all_to_all_bytes_per_token=20.0)
    return replace(
        cost,
        kv_bytes_per_token=2.0,
        num_heads=6,
        num_kv_heads=2,
        ranks_per_node=4,
        network_bytes_per_s=5.0,
        activation_policies={"recompute": policy},
        **changes,
    )


@pytest.mark.parametrize("methods", [METHODS, ("ulysses",), ("gather", "ring")])
@pytest.mark.parametrize("lengths", [[300, 60, 60, 40, 40, 20] * 3, [(60, 30), (44, 10), 200, (5, 5, 5)] * 4])
def test_methods_activations_and_items(methods: Sequence[str], lengths: Any) -> None:
    """Whatever groups do, and sequences that stay together: no slower than to ignore, and memory is kept."""
    cost = full_cost(rank_speeds={4: 0.5, 5: 0.5, 6: 0.8}, link_speeds={4: 0.3})
    ours = Planner(cost, 8, methods=methods)
    plan, ignoring = ours.plan(lengths), replace(ours, cost_model=cost.evened()).plan(lengths)
    by_sequence, tokens = sequences_of(plan, lengths), flat(lengths)
    assert plan.num_samples == len(lengths)
    assert problems(by_sequence, tokens, 8, cost) == []
    assert plan.seconds == pytest.approx(cost.plan_seconds(by_sequence, tokens))
    assert plan.seconds <= cost.plan_seconds(sequences_of(ignoring, lengths), tokens) * (1 + 1e-9)
    assert plan.lower_bound_s <= plan.seconds
    better = replace(ours, mip_time_limit_s=0.2).improve(plan, lengths)
    assert better.seconds <= plan.seconds
    assert ours.static(lengths).seconds >= better.lower_bound_s


def test_another_process_knows_the_speeds() -> None:
    """They travel with the cost model, and the plan is the same there."""
    ours = Planner(replace(small_cost(), rank_speeds={0: 0.6}, link_speeds={4: 0.5}), 8)
    lengths = [150, 99, 80, 60, 60, 31, 7] * 5
    elsewhere = PlannerProcess(lambda: ours)
    try:
        assert elsewhere.plan(lengths).digest() == ours.plan(lengths).digest()
    finally:
        elsewhere.close()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared lengths and cost models")
@pytest.mark.parametrize("name", ["wikipedia", pytest.param("github", marks=pytest.mark.slow)])
def test_one_slow_node_of_eight(name: str) -> None:
    """A node at 0.7 costs much less than where nobody knows of it, and the plan is near its bound."""
    cost = CostModel.load(SHARED / "data" / "costs" / "gpt-7b_64xa100_192k.json")
    slow = replace(cost, rank_speeds=dict.fromkeys(range(24, 32), 0.7))
    lengths = np.loadtxt(SHARED / "data" / "lengths" / f"{name}.txt", dtype=np.int64)
    batch = np.random.default_rng(0).choice(lengths[lengths <= 196_608], 512).tolist()
    plan, ignoring = Planner(slow, 64).plan(batch), Planner(cost, 64).plan(batch)
    assert problems(plan, batch, 64, slow) == []
    assert judged_seconds(ignoring.to_dict(), batch, slow.to_dict()) > 1.1 * plan.seconds
    assert plan.gap < 0.25
