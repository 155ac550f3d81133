"""Laws of plans whose samples are items: sequences that stay together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner.reference import batches, optimal_seconds, problems, small_cost

from hf_hetero.costs import ActivationPolicy, CostModel
from hf_hetero.errors import BadSample, ConfigError, InfeasibleBatch
from hf_hetero.plan import Group, MicroBatch, Plan
from hf_hetero.planner import Planner
from hf_hetero.planner.items import flat, sequences_of

Items = list[Any]


@st.composite
def item_batches(draw: st.DrawFn, **limits: int) -> tuple[Items, int, CostModel]:
    """A batch of samples, of which each may be cut into up to three sequences."""
    lengths, num_ranks, cost = draw(batches(**limits))
    items: Items = []
    for length in lengths:
        cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=2))) if length > 1 else []
        ends = [*cuts, length]
        parts = tuple(end - start for start, end in zip([0, *cuts], ends, strict=True))
        items.append(parts if len(parts) > 1 or draw(st.booleans()) else length)
    return items, num_ranks, cost


@settings(max_examples=150, deadline=None)
@given(item_batches())
def test_any_batch_of_items(batch: tuple[Items, int, CostModel]) -> None:
    """Each item once and whole, memory kept to the token, seconds of its sequences; bound <= seconds <= best static."""
    items, num_ranks, cost = batch
    planner = Planner(cost, num_ranks)
    plan = planner.plan(items)
    assert plan.num_samples == len(items)
    by_sequence = sequences_of(plan, items)
    assert problems(by_sequence, flat(items), num_ranks, cost) == []
    assert plan.seconds == pytest.approx(cost.plan_seconds(by_sequence, flat(items)), rel=1e-12)
    assert plan.lower_bound_s <= plan.seconds * (1 + 1e-9)
    for degree in [None, *planner.degrees]:
        try:
            static = planner.static(items, degree)
        except InfeasibleBatch:
            continue
        assert plan.seconds <= static.seconds * (1 + 1e-9)
        assert static.seconds == pytest.approx(cost.plan_seconds(sequences_of(static, items), flat(items)), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(item_batches(max_ranks=4, max_samples=6))
def test_close_to_the_best_of_all_plans(batch: tuple[Items, int, CostModel]) -> None:
    """On batches small enough to try every plan: none is faster than the bound, and the best is not far ahead."""
    items, num_ranks, cost = batch
    plan = Planner(cost, num_ranks).plan(items)
    best_s = optimal_seconds(items, num_ranks, cost)
    assert plan.lower_bound_s <= best_s * (1 + 1e-9)
    assert best_s * (1 - 1e-9) <= plan.seconds <= best_s * 1.35


@settings(max_examples=40, deadline=None)
@given(batches())
def test_items_of_one_sequence_are_samples(batch: tuple[list[int], int, CostModel]) -> None:
    """A tuple with one length means what the length means."""
    lengths, num_ranks, cost = batch
    planner = Planner(cost, num_ranks)
    as_items, as_samples = planner.plan([(length,) for length in lengths]), planner.plan(lengths)
    assert as_items.seconds <= as_samples.seconds * (1 + 1e-9)
    assert as_items.lower_bound_s == pytest.approx(as_samples.lower_bound_s, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(item_batches(max_samples=12))
def test_improving_keeps_items_whole(batch: tuple[Items, int, CostModel]) -> None:
    """An improved plan is valid, no slower, and its bound no lower."""
    items, num_ranks, cost = batch
    planner = Planner(cost, num_ranks, mip_time_limit_s=0.1)
    plan = planner.plan(items)
    better = planner.improve(plan, items)
    assert problems(sequences_of(better, items), flat(items), num_ranks, cost) == []
    assert better.num_samples == len(items)
    assert better.seconds <= plan.seconds
    assert better.lower_bound_s >= plan.lower_bound_s


def test_sequences_stand_side_by_side() -> None:
    """Sequences count through the batch, item after item; a group holds all those of its items."""
    plan = Plan(2, (MicroBatch((Group((0,), (2, 0)), Group((1,), (1,)))),))
    by_sequence = sequences_of(plan, [(5, 6), 7, (1, 2, 3)])
    assert [group.samples for group in by_sequence.groups] == [(3, 4, 5, 0, 1), (2,)]


def test_an_item_costs_what_its_sequences_do() -> None:
    """Where attention is all that costs, a pair of halves costs half of a sample of all its tokens."""
    cost = replace(small_cost(), linear_s_per_token=0.0, micro_batch_s=0.0)
    pair, whole = (Planner(cost, 1).plan([item]).seconds for item in ((20, 20), 40))
    assert pair == pytest.approx(whole / 2)


def test_items_and_policies() -> None:
    """An item that only a policy makes room for is planned with it, at its true cost."""
    base = small_cost()
    policy = ActivationPolicy(
        base.activation_bytes_per_token / 4, base.attention_s_per_token2 * 1.3, base.linear_s_per_token * 1.3
    )
    cost = replace(base, activation_policies={"recompute": policy})
    room = cost.capacity_tokens
    items: Items = [(room, room), (room // 3, room // 3), 5]
    plan = Planner(cost, 1).plan(items)
    assert {group.activations for group in plan.groups if 0 in group.samples} == {"recompute"}
    assert plan.seconds == pytest.approx(cost.plan_seconds(sequences_of(plan, items), flat(items)))


@settings(max_examples=60, deadline=None)
@given(item_batches(max_samples=6, max_ranks=4))
def test_static_seconds_are_those_of_static_plans(batch: tuple[Items, int, CostModel]) -> None:
    """Each degree that holds the longest item, and no other, to the last bit; no plan is slower than the best."""
    items, num_ranks, cost = batch
    policy = ActivationPolicy(
        cost.activation_bytes_per_token / 2, cost.attention_s_per_token2 * 1.3, cost.linear_s_per_token * 1.3
    )
    for machine in (cost, replace(cost, activation_policies={"recompute": policy})):
        planner = Planner(machine, num_ranks)
        longest, room = max(sum(flat([item])) for item in items), machine.leanest.capacity_tokens
        holding = [degree for degree in planner.degrees if longest <= room * degree]
        expected = {degree: planner.static(items, degree).seconds for degree in holding}
        assert planner.static_seconds(items) == expected
        assert planner.plan(items).seconds <= min(expected.values()) * (1 + 1e-9)
        assert planner.static(items).seconds == min(expected.values())


@pytest.mark.parametrize(
    ("items", "words"), [([()], "without a sequence"), ([(3, 0)], "sample 0 has length 0"), ([4, (1.5,)], "sample 1")]
)
def test_bad_items(items: Items, words: str) -> None:
    """What is no item is refused by its number."""
    with pytest.raises(BadSample, match=words):
        Planner(small_cost(), 2).plan(items)


def test_an_item_too_long_for_every_degree() -> None:
    """The tokens of all sequences of an item must fit one group, though each alone would fit a rank."""
    cost = small_cost()
    with pytest.raises(InfeasibleBatch, match="sample 1"):
        Planner(cost, 2).plan([3, (cost.capacity_tokens,) * 3])


def test_a_plan_of_other_items() -> None:
    """A plan is improved for the items that it was made for."""
    planner = Planner(small_cost(), 2)
    plan = planner.plan([(3, 4), 5])
    with pytest.raises(ConfigError, match="Improve a plan with the lengths"):
        planner.improve(plan, [(3, 3), 5])
