"""What crossing ranks costs, by each method: the documented formula, from tokens counted one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
from costs.test_cost_model import OFFLOAD, RECOMPUTE, a_cost_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_hetero import CostModel, Group
from hf_hetero.costs import ActivationPolicy, Charges
from hf_hetero.costs.volume import Batch
from hf_hetero.errors import ConfigError
from hf_hetero.layout import Layout, asking, blocks_of, contiguous, layout_of, needed

DEGREES = (1, 2, 4, 8)
BATCHES = st.lists(st.integers(1, 60) | st.sampled_from([1, 200, 1000]), min_size=1, max_size=8)
POLICIES = {"recompute": ActivationPolicy(**RECOMPUTE), "offload": ActivationPolicy(**OFFLOAD)}


def that_knows_methods(**changes: Any) -> CostModel:
    options: dict[str, Any] = {
        "all_to_all_bytes_per_s": {2: 1e6, 4: 5e5, 8: 1e5},
        "all_to_all_latency_s": {2: 0.125, 4: 0.25, 8: 0.5},
        "memory_bytes_per_rank": 1e6,
        "kv_bytes_per_token": 100,
        "query_bytes_per_token": 150,
        "ranks_per_node": 2,
        "network_bytes_per_s": 5e4,
        "activation_policies": POLICIES,
    }
    return a_cost_model(**{**options, **changes})


COST_MODELS = st.builds(
    that_knows_methods,
    kv_bytes_per_token=st.none() | st.floats(0, 1000),
    num_heads=st.none() | st.integers(1, 12),
    num_kv_heads=st.none() | st.integers(1, 4),
    ring_overlap=st.floats(0, 1),
    query_bytes_per_token=st.none() | st.floats(0, 1000),
    both_ways_overlap=st.none() | st.floats(0, 1),
    ranks_per_node=st.sampled_from([None, 2, 4]),
    network_bytes_per_s=st.none() | st.floats(1e3, 1e6),
)


def ways_of(cost: CostModel, degree: int, lengths: list[int]) -> list[Group]:
    """A group of all samples in each way to cross its ranks, under each policy and none."""
    group = Group(tuple(range(degree)), tuple(range(len(lengths))))
    return [
        Group(way.ranks, way.samples, way.method, way.ulysses_degree, activations=name)
        for name, model in cost.by_activations.items()
        for way in model.methods(group, lengths)
    ]


@settings(max_examples=40, deadline=None)
@given(cost=COST_MODELS, lengths=BATCHES)
def test_what_a_batch_remembers_changes_no_seconds(cost: CostModel, lengths: list[int]) -> None:
    """A way costs to the bit what it does alone, whichever ways, degrees and samples were priced before."""
    batch = Batch(lengths)
    for degree in (8, 4):
        for way in ways_of(cost, degree, lengths):
            alone = Group(way.ranks, way.samples[:1], way.method, way.ulysses_degree, way.activations)
            for group in (way, alone, way):
                assert cost.group_seconds(group, batch) == cost.group_seconds(group, lengths)
                assert cost.charges(group, batch) == cost.charges(group, lengths)


def moved_tokens(blocks: Layout) -> int:
    """Tokens whose keys the busiest block of ranks sends or receives, pair by pair."""
    ranks = range(blocks.degree)
    sent = [[sum(s.num_tokens for s in needed(blocks, to, me)) if to != me else 0 for to in ranks] for me in ranks]
    return max([*map(sum, sent), *map(sum, zip(*sent, strict=True))])


def lent_tokens(layout: Layout) -> int:
    """Tokens whose queries the busiest rank sends or receives, pair by pair."""
    ranks = range(layout.degree)
    sent = [[sum(s.num_tokens for s in asking(layout, me, to)) if to != me else 0 for to in ranks] for me in ranks]
    return max([*map(sum, sent), *map(sum, zip(*sent, strict=True))])


def charged_by_queries(cost: CostModel, group: Group, lengths: list[int]) -> Charges:
    """What the README says that a group is charged in which queries go round."""
    degree, layout = group.degree, layout_of(group, lengths)
    keys = [[(lengths[s.sample], t) for s in spans for t in range(s.start, s.end)] for spans in layout.spans]
    attention_s = cost.attention_s_per_token2 * max(sum(2 * (n - t) - 1 for n, t in of_rank) for of_rank in keys)
    linear_s = cost.linear_s_per_token * sum(lengths) / degree
    if not layout.is_cut:
        return Charges(attention_s, linear_s, 0, cost.micro_batch_s)
    assert cost.query_bytes_per_token is not None
    once_s = cost.query_bytes_per_token * lent_tokens(layout) / cost.all_to_all_bytes_per_s[degree]
    home = 1 - (cost.both_ways_overlap or 0)
    forward_s, backward_s = (1 + home) * once_s, (2 + home) * once_s
    batches_s = cost.all_to_all_latency_s[degree] / 2 * (2 if degree == 2 else degree + 1)
    shown_s = max(0, forward_s + backward_s + batches_s - cost.ring_overlap * attention_s)
    return Charges(attention_s, linear_s, shown_s, cost.micro_batch_s)


def charged(cost: CostModel, group: Group, lengths: list[int]) -> Charges:
    """What the README says that a group is charged which follows no policy."""
    if group.method == "token_ring" and group.degree > 1:
        return charged_by_queries(cost, group, lengths)
    degree = group.degree
    inner = degree if group.method == "ulysses" else group.ulysses_degree or 1
    tokens, layout = sum(lengths) / degree, layout_of(group, lengths)
    blocks = contiguous(lengths, 1) if inner == degree else blocks_of(layout)
    pairs = max(sum(2 * t + 1 for s in spans for t in range(s.start, s.end)) for spans in blocks.spans)
    heads = inner * math.ceil(cost.num_heads / inner) / cost.num_heads if cost.num_heads else 1
    attention_s = cost.attention_s_per_token2 * pairs / inner * (heads if cost.kv_bytes_per_token is not None else 1)
    within_s = cost.all_to_all_bytes_per_token * tokens / cost.all_to_all_bytes_per_s[inner] if inner > 1 else 0
    fixed_s = cost.micro_batch_s + (cost.all_to_all_latency_s[inner] if inner > 1 else 0)
    linear_s, moved = cost.linear_s_per_token * tokens, moved_tokens(blocks)
    if not moved:
        return Charges(attention_s, linear_s, within_s, fixed_s)
    assert cost.kv_bytes_per_token is not None
    speed = cost.all_to_all_bytes_per_s[degree] if inner == 1 else cost.network_bytes_per_s
    assert speed
    copies = max(1, inner / cost.num_kv_heads) if cost.num_kv_heads else 1
    once_s, latency_s = cost.kv_bytes_per_token * copies / inner * moved / speed, cost.all_to_all_latency_s[degree]
    if group.method == "gather":
        return Charges(attention_s, linear_s, within_s + 2 * once_s, fixed_s + latency_s / 2)
    messages_s = 3 / 4 * latency_s * (blocks.degree - 1)
    shown_s = max(0, 3 * once_s + messages_s - cost.ring_overlap * attention_s)
    return Charges(attention_s, linear_s, within_s + shown_s, fixed_s)


@settings(deadline=None)
@given(COST_MODELS, st.sampled_from(DEGREES), BATCHES)
def test_charges_sum_to_seconds(cost: CostModel, degree: int, lengths: list[int]) -> None:
    """By every method and policy, no part is negative, and all parts are the group's seconds.

    Where the ranks exchange heads that divide, those are seconds of the first formula.
    """
    for group in ways_of(cost, degree, lengths):
        charges, model = cost.charges(group, lengths), cost.of_group(group)
        assert min(charges) >= 0
        assert sum(charges) == pytest.approx(cost.group_seconds(group, lengths))
        if group.method == "ulysses" and model.head_imbalance(degree) == 1:
            assert sum(charges) == pytest.approx(model.seconds(lengths, degree))


@settings(deadline=None)
@given(COST_MODELS, st.sampled_from(DEGREES), BATCHES)
@example(that_knows_methods(num_heads=3, num_kv_heads=1, ring_overlap=0.5), 4, [60, 200, 1000])
def test_charges_are_the_formula(cost: CostModel, degree: int, lengths: list[int]) -> None:
    """Part by part, for each way to cross ranks, under each policy."""
    for group in ways_of(cost, degree, lengths):
        expected = charged(cost.of_group(group), group, lengths)
        assert cost.charges(group, lengths) == pytest.approx(expected)


def test_all_ways_are_tried() -> None:
    """The laws above are about every method, under every policy: none is left out by the cost models drawn."""
    methods = ("ulysses", "ring", "gather", "ulysses_ring", "token_ring")
    tried = {(group.method, group.activations) for group in ways_of(that_knows_methods(), 4, [60, 200, 1000])}
    assert tried == {(method, policy) for method in methods for policy in (None, *POLICIES)}


def test_more_exchange_costs_more() -> None:
    """Bytes, slower links and messages count where keys travel; samples that ranks hold whole exchange nothing."""
    group, cut, whole = Group((0, 1), (0, 1), "ring"), [1000, 60], [60, 60]
    plain = that_knows_methods()
    wide = that_knows_methods(kv_bytes_per_token=200)
    slow = that_knows_methods(all_to_all_bytes_per_s={2: 5e5})
    far = that_knows_methods(all_to_all_latency_s={2: 0.25})
    for dearer in (wide, slow, far):
        assert dearer.charges(group, cut).exchange_s > plain.charges(group, cut).exchange_s > 0
        assert dearer.charges(group, whole).exchange_s == 0


def test_a_token_ring_needs_to_know_of_queries() -> None:
    """Files without their bytes offer what they always did, and cost the same; with them, nothing else changes."""
    knows, without = that_knows_methods(), that_knows_methods(query_bytes_per_token=None)
    group = Group((0, 1, 2, 3), (0, 1))
    assert {way.method for way in knows.methods(group, [1000, 60])} - {"token_ring"} == {
        way.method for way in without.methods(group, [1000, 60])
    }
    for way in without.methods(group, [1000, 60]):
        assert without.charges(way, [1000, 60]) == knows.charges(way, [1000, 60])


def test_what_comes_home_may_hide() -> None:
    """Behind what goes out, where links carry both ways at once: of 5 trips, one forward and one back in backward."""
    group, lengths = Group((0, 1, 2, 3), (0,), "token_ring"), [1000]
    free = {"all_to_all_latency_s": {}, "ring_overlap": 0.0}
    one, both = (that_knows_methods(both_ways_overlap=share, **free).charges(group, lengths) for share in (None, 1.0))
    assert one.exchange_s == pytest.approx(5 / 3 * both.exchange_s)
    assert that_knows_methods(both_ways_overlap=0.0, **free).charges(group, lengths) == one
    with pytest.raises(ConfigError, match=r"both_ways_overlap is 1\.5"):
        that_knows_methods(both_ways_overlap=1.5)
