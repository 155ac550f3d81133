"""Methods are chosen by cost, group by group: never slower than without, never below the bound or over the memory."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner.reference import optimal_seconds, problems

from hf_hetero import CostModel, Plan, Planner
from hf_hetero.config import DEFAULT_METHODS
from hf_hetero.costs import ActivationPolicy, shipped_names
from hf_hetero.errors import ConfigError, InfeasibleBatch
from hf_hetero.plan import METHODS, Group, MicroBatch
from hf_hetero.planner.methods import with_methods
from hf_hetero.what_if.sources import read_source

LENGTHS = [9000, 3, 170, 1100, 4000, 64, 2100, 33, 700, 4, 1300, 500]


COST = CostModel(
    attention_s_per_token2=1e-9,
    linear_s_per_token=2e-6,
    micro_batch_s=1e-3,
    all_to_all_bytes_per_token=4e4,
    all_to_all_bytes_per_s={2: 2e10, 4: 5e9, 8: 4e9},
    all_to_all_latency_s={2: 1e-4, 4: 2e-4, 8: 4e-4},
    activation_bytes_per_token=1e5,
    model_state_bytes_per_rank=0,
    memory_bytes_per_rank=4e8,
    kv_bytes_per_token=5e3,
    network_bytes_per_s=3e9,
    num_kv_heads=8,
    ring_overlap=0.3,
    ranks_per_node=2,
)


def a_cost(**changes: Any) -> CostModel:
    """Slow links, of a model whose keys are an eighth of what exchanging heads moves; with changes."""
    return replace(COST, **changes)


batches = st.lists(st.integers(1, 12_000), min_size=1, max_size=24)


@settings(deadline=None)
@given(batches, st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([None, 2, 6]), st.sampled_from([None, 2e3, 1e5]))
def test_laws(lengths: list[int], num_ranks: int, num_heads: int | None, query_bytes: float | None) -> None:
    """Valid; no slower than exchanging heads only; at or above the bound; seconds as the cost model counts them."""
    cost = a_cost(num_heads=num_heads, query_bytes_per_token=query_bytes)
    if max(lengths) > cost.capacity_tokens * max(d for d in cost.degrees(num_ranks) if num_ranks >= d):
        return
    plan, heads = (Planner(cost, num_ranks, methods=methods).plan(lengths) for methods in (METHODS, ("ulysses",)))
    assert plan.num_samples == len(lengths)
    assert plan.seconds == pytest.approx(cost.plan_seconds(plan, lengths))
    assert plan.seconds <= heads.seconds * (1 + 1e-9)
    assert plan.lower_bound_s <= plan.seconds * (1 + 1e-9)
    assert plan.lower_bound_s <= heads.lower_bound_s * (1 + 1e-9)
    for group in plan.groups:
        tokens = sum(lengths[sample] for sample in group.samples)
        assert tokens <= group.degree * cost.capacity_tokens
        assert group in cost.methods(Group(group.ranks, group.samples), lengths)


def test_each_method_is_best_somewhere() -> None:
    """Short samples gather; a long one rings where keys are few and links fast; across slow nodes it does both."""

    def chosen(cost: CostModel, lengths: list[int], degree: int) -> str:
        group = Group(tuple(range(degree)), tuple(range(len(lengths))))
        plan = with_methods(cost, Plan(degree, (MicroBatch((group,)),)), lengths, METHODS)
        return plan.micro_batches[0].groups[0].method

    short = [100] * 41
    assert chosen(a_cost(), short, 4) == "gather"
    assert chosen(a_cost(kv_bytes_per_token=1e6), [9001], 4) == "ulysses"
    assert chosen(a_cost(ranks_per_node=8, ring_overlap=1.0, memory_bytes_per_rank=2.4e8), [9001], 4) == "ring"
    assert chosen(a_cost(), [30_001], 8) == "ulysses_ring"


def test_a_token_ring_is_chosen_where_it_wins() -> None:
    """With as many heads of keys as of queries, and never where it was not asked for, or keys are few."""
    sizes = {"kv_bytes_per_token": 6e3, "query_bytes_per_token": 3e3, "all_to_all_bytes_per_token": 2.4e4}
    mha = a_cost(**sizes, ranks_per_node=8, ring_overlap=1.0)
    gqa = replace(mha, kv_bytes_per_token=750.0, all_to_all_bytes_per_token=1.35e4)
    lengths = [24_000]
    by_default, asked, few_keys = (
        Planner(cost, 8, methods=methods).plan(lengths)
        for cost, methods in ((mha, DEFAULT_METHODS), (mha, METHODS), (gqa, METHODS))
    )
    assert {group.method for group in asked.groups if group.samples} == {"token_ring"}
    assert asked.seconds < by_default.seconds
    unknowing = Planner(replace(mha, query_bytes_per_token=None), 8).plan(lengths)
    assert replace(by_default, planning_s=0) == replace(unknowing, planning_s=0)
    assert "token_ring" not in {group.method for group in few_keys.groups}
    group, ring = (Group(tuple(range(8)), (0,), method) for method in ("token_ring", "ring"))
    assert gqa.group_seconds(ring, lengths) < gqa.group_seconds(group, lengths)


@pytest.mark.parametrize("name", [name for name in shipped_names() if CostModel.load(name).query_bytes_per_token])
def test_few_keys_are_no_case_for_a_token_ring(name: str) -> None:
    """By the shipped estimates, all of models with fewer heads for keys than for queries, a ring is never slower."""
    cost = CostModel.load(name)
    for lengths in ([200_000], [9000, 8000, 300], [5000] * 9, LENGTHS):
        for degree in (2, 4, 8):
            group = Group(tuple(range(degree)), tuple(range(len(lengths))))
            lent, ring = (cost.group_seconds(replace(group, method=m), lengths) for m in ("token_ring", "ring"))
            assert ring <= lent
    long, eight = [9000, 8000, 300], tuple(range(8))
    many_keys = replace(cost, kv_bytes_per_token=4 * (cost.kv_bytes_per_token or 0), ring_overlap=0.0)
    lent, ring = (many_keys.group_seconds(Group(eight, (0, 1, 2), m), long) for m in ("token_ring", "ring"))
    assert lent < ring, "with four times as many heads for keys it would be"


def test_more_ranks_than_heads() -> None:
    """Exchanged, two heads keep two of eight ranks busy: that costs, so larger groups go another way."""
    cost, group = a_cost(num_heads=2), Group(tuple(range(8)), (0,))
    uneven, even = cost.charges(group, [30_001]), a_cost().charges(group, [30_001])
    assert uneven.attention_s == pytest.approx(4 * even.attention_s)
    assert uneven._replace(attention_s=even.attention_s) == even
    methods = {g.method for g in Planner(cost, 8).plan([30_001]).groups if g.degree > 2}
    assert methods
    assert "ulysses" not in methods
    assert {g.method for g in Planner(cost, 8, methods=["ulysses"]).plan([30_001]).groups} == {"ulysses"}


def test_large_degrees_do_not_lead_astray() -> None:
    """Where small degrees hold a batch, a plan is no slower than without those that do not divide the heads."""
    cost = a_cost(num_heads=2, ring_overlap=0.0, kv_bytes_per_token=1e6, memory_bytes_per_rank=4e9)
    for lengths in (LENGTHS, [30_000, *LENGTHS], [12_000] * 3):
        fewer = Planner(cost.with_degrees([2]), 8).plan(lengths)
        assert Planner(cost, 8).plan(lengths).seconds <= fewer.seconds * (1 + 1e-9)


def test_what_is_gathered_must_fit() -> None:
    """Keys from elsewhere stay until backward: without room for them, gathering is not offered."""
    group = Group((0, 1, 2, 3), (0,))
    roomy, tight = a_cost(), a_cost(memory_bytes_per_rank=2.4e8)
    assert "gather" in [way.method for way in roomy.methods(group, [9001])]
    assert "gather" not in [way.method for way in tight.methods(group, [9001])]
    assert tight.num_bytes([9001], 4) < tight.memory_bytes_per_rank


def test_a_cost_model_that_knows_no_methods_plans_none() -> None:
    """Files without the new fields give the plans they always gave."""
    cost = a_cost(kv_bytes_per_token=None)
    plan = Planner(cost, 4).plan(LENGTHS)
    assert {group.method for group in plan.groups} == {"ulysses"}
    assert replace(plan, planning_s=0) == replace(Planner(cost, 4, methods=["ulysses"]).plan(LENGTHS), planning_s=0)


def test_improvement_keeps_methods() -> None:
    """A plan with methods is improved, if at all, to one with methods that is faster."""
    planner = Planner(a_cost(), 4, mip_time_limit_s=0.5)
    plan = planner.plan(LENGTHS)
    better = planner.improve(plan, LENGTHS)
    assert better.seconds <= plan.seconds
    assert better.lower_bound_s >= plan.lower_bound_s
    assert better.seconds == pytest.approx(planner.cost_model.plan_seconds(better, LENGTHS))


def test_unknown_methods_are_refused() -> None:
    """By name, with those there are."""
    with pytest.raises(ConfigError, match=r"teleport.*ulysses, gather, ring, ulysses_ring"):
        Planner(a_cost(), 4, methods=["teleport"])


POLICIES = {
    "recompute": ActivationPolicy(3e4, 1.3e-9, 2.7e-6),
    "offload": ActivationPolicy(1e4, 1.3e-9, 3.2e-6, exchanges=1.5),
}


@pytest.mark.slow
@settings(deadline=None)
@given(batches, st.sampled_from([1, 2, 4, 8]), st.booleans(), st.sampled_from([("ulysses",), METHODS]))
def test_laws_of_policies(lengths: list[int], num_ranks: int, knows_kv: bool, methods: tuple[str, ...]) -> None:
    """Valid; no slower than one policy for all groups, or one degree; the bound is below all of them."""
    cost = a_cost(activation_policies=POLICIES, **({} if knows_kv else {"kv_bytes_per_token": None}))
    planner = Planner(cost, num_ranks, methods=methods)
    if max(lengths) > cost.leanest.capacity_tokens * planner.degrees[-1]:
        with pytest.raises(InfeasibleBatch, match="activation_policies"):
            planner.plan(lengths)
        return
    plan, static = planner.plan(lengths), planner.static(lengths)
    assert problems(plan, lengths, num_ranks, cost) == [] == problems(static, lengths, num_ranks, cost)
    assert plan.seconds == pytest.approx(cost.plan_seconds(plan, lengths))
    assert static.seconds == pytest.approx(cost.plan_seconds(static, lengths))
    assert plan.seconds <= static.seconds * (1 + 1e-9)
    for under in cost.by_activations.values():
        if max(lengths) <= under.capacity_tokens * planner.degrees[-1]:
            alone = Planner(under, num_ranks, methods=methods).plan(lengths)
            assert plan.seconds <= alone.seconds * (1 + 1e-9)
            assert plan.lower_bound_s <= min(alone.seconds, static.seconds, plan.seconds) * (1 + 1e-9)
    improved = planner.improve(plan, lengths)
    assert improved.seconds <= plan.seconds * (1 + 1e-9)
    assert improved.lower_bound_s <= improved.seconds * (1 + 1e-9)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 12_000), min_size=1, max_size=6), st.sampled_from([1, 2, 4]))
def test_policies_against_brute_force(lengths: list[int], num_ranks: int) -> None:
    """Within a fifth of the best of all plans, which is at or above the bound."""
    cost = a_cost(activation_policies=POLICIES, kv_bytes_per_token=None)
    if max(lengths) > cost.leanest.capacity_tokens * num_ranks:
        return
    plan, best_s = Planner(cost, num_ranks).plan(lengths), optimal_seconds(lengths, num_ranks, cost)
    assert plan.lower_bound_s * (1 - 1e-9) <= best_s <= plan.seconds * (1 + 1e-9)
    assert plan.seconds <= 1.2 * best_s


def test_only_who_must_recomputes() -> None:
    """A sample too long for all ranks otherwise recomputes; a micro-batch without such a one does not."""
    cost = a_cost(activation_policies=POLICIES, kv_bytes_per_token=None)
    plan = Planner(cost, 2).plan([20_000, 3900, 3900])
    by_sample = {group.samples: group.activations for group in plan.groups}
    assert by_sample == {(0,): "recompute", (1,): None, (2,): None}
    assert not any(group.activations for group in Planner(cost, 2).plan([3900, 3900]).groups)


@pytest.mark.parametrize("methods", [METHODS, ("ring",), ("ulysses", "gather")])
@pytest.mark.parametrize(("name", "num_ranks"), [("llama-8b_8xh100_pcie", 8), ("llama-8b_64xa100_ib", 16)])
def test_never_worse_than_one_degree_with_methods(name: str, num_ranks: int, methods: tuple[str, ...]) -> None:
    """A run with one degree may choose its methods, too, and is no faster."""
    cost = CostModel.load(name)
    planner = Planner(cost, num_ranks, methods=methods)
    for seed in range(4):
        lengths = read_source("long-sft", 24, seed=seed, max_tokens=planner.degrees[-1] * cost.capacity_tokens).lengths
        plan = planner.plan(lengths.tolist())
        for degree in planner.degrees:
            with suppress(InfeasibleBatch):
                fixed = with_methods(cost, planner.static(lengths.tolist(), degree), lengths.tolist(), methods)
                assert plan.seconds <= fixed.seconds * (1 + 1e-9), (seed, degree)
