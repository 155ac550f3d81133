"""A group is as fast as its slowest rank, and its exchange as its slowest link."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_hetero import CostModel, Group, MicroBatch, Plan
from hf_hetero.costs import ActivationPolicy, shipped_names
from hf_hetero.costs.places import Place, Places
from hf_hetero.errors import ConfigError

LENGTHS = [100, 200, 50, 30]


def a_cost_model(**changes: Any) -> CostModel:
    options: dict[str, Any] = {
        "attention_s_per_token2": 1e-6,
        "linear_s_per_token": 1e-3,
        "micro_batch_s": 0.5,
        "all_to_all_bytes_per_token": 1000,
        "all_to_all_bytes_per_s": {2: 1e6, 4: 5e5},
        "all_to_all_latency_s": {4: 0.25},
        "activation_bytes_per_token": 10,
        "model_state_bytes_per_rank": 100,
        "memory_bytes_per_rank": 1105,
    }
    return CostModel(**{**options, **changes})


def test_seconds_by_hand() -> None:
    """Compute by the slowest rank of the group, exchange by the slowest link inside it, the rest as it is."""
    cost = a_cost_model(rank_speeds={1: 0.5, 5: 0.8}, link_speeds={0: 0.01, 3: 0.25, 4: 0.1})
    computed, moved = 1e-6 * 50000 + 1e-3 * 300, 1000 * 300
    expected = {
        (0,): 0.5 + computed,
        (1,): 0.5 + computed / 0.5,
        (2, 3): 0.5 + computed / 2 + moved / 2 / 1e6 / 0.25,  # the links before 2 and 4 are outside
        (4, 5): 0.5 + computed / 2 / 0.8 + moved / 2 / 1e6,
        (0, 1, 2, 3): 0.75 + computed / 4 / 0.5 + moved / 4 / 5e5 / 0.25,
        (4, 5, 6, 7): 0.75 + computed / 4 / 0.8 + moved / 4 / 5e5,
    }
    for ranks, seconds in expected.items():
        group = Group(ranks, (0, 1))
        assert cost.group_seconds(group, LENGTHS) == pytest.approx(seconds)
        assert sum(cost.charges(group, LENGTHS)) == pytest.approx(seconds)
    plan = Plan(4, (MicroBatch((Group((0, 1), (0, 1)), Group((2,), (2,)), Group((3,), (3,)))),))
    assert cost.plan_seconds(plan, LENGTHS) == pytest.approx(0.5 + computed / 2 / 0.5 + moved / 2 / 1e6)


def test_what_does_not_depend_on_places() -> None:
    """Memory, degrees, and the seconds of full speed are those of the same file without speeds."""
    even, cost = a_cost_model(), a_cost_model(rank_speeds={1: 0.5}, link_speeds={1: 0.5})
    assert cost.capacity_tokens == even.capacity_tokens
    assert cost.degrees(8) == even.degrees(8)
    assert cost.seconds(LENGTHS, 2) == even.seconds(LENGTHS, 2)
    assert cost.evened() == even
    assert not even.is_uneven
    assert cost.is_uneven


def test_other_methods_and_policies_are_slower_there_too() -> None:
    """Groups that gather, ring or recompute: attention and linear by the rank, exchange by the link."""
    policies = {"recompute": ActivationPolicy(4, 1.5e-6, 2e-3, exchanges=1.5)}
    # without latency, of which a ring's exchange has a part that no link slows down
    options: dict[str, Any] = {"kv_bytes_per_token": 100.0, "num_heads": 4, "all_to_all_latency_s": {}}
    even = a_cost_model(activation_policies=policies, **options)
    cost = replace(even, rank_speeds={3: 0.5}, link_speeds={2: 0.25})
    for method in ("ulysses", "gather", "ring"):
        for activations in (None, "recompute"):
            group = Group((0, 1, 2, 3), (0, 1), method, activations=activations)
            full, there = even.charges(group, LENGTHS), cost.charges(group, LENGTHS)
            assert there.attention_s == pytest.approx(full.attention_s / 0.5)
            assert there.linear_s == pytest.approx(full.linear_s / 0.5)
            assert there.exchange_s == pytest.approx(full.exchange_s / 0.25)  # no ring hides here
            assert there.fixed_s == full.fixed_s
            elsewhere = Group((4, 5, 6, 7), (0, 1), method, activations=activations)
            assert cost.group_seconds(elsewhere, LENGTHS) == pytest.approx(even.group_seconds(elsewhere, LENGTHS))
    assert cost.methods(Group((0, 1, 2, 3), (0, 1)), LENGTHS) == even.methods(Group((0, 1, 2, 3), (0, 1)), LENGTHS)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(0, 8), st.floats(0.01, 1.0)),
    st.dictionaries(st.integers(0, 8), st.floats(0.01, 1.0)),
    st.sampled_from([(0, 1), (4, 5, 6, 7), (0, 1, 2, 3), (6,)]),
    st.sampled_from(["ulysses", "gather", "ring"]),
    st.floats(0, 1),
)
def test_slow_ranks_make_nothing_faster(
    ranks: dict[int, float], links: dict[int, float], of: tuple[int, ...], method: str, overlap: float
) -> None:
    """Whatever is slow, and whatever a ring hides behind attention that takes longer: no group gets faster."""
    even = a_cost_model(kv_bytes_per_token=1e4, ring_overlap=overlap, state_s_per_token={2: 1e-4})
    cost, group = replace(even, rank_speeds=ranks, link_speeds=links), Group(of, (0, 1, 2), method)
    assert cost.group_seconds(group, LENGTHS) >= even.group_seconds(group, LENGTHS) * (1 - 1e-12)


def test_a_place_is_the_slowest_of_its_ranks() -> None:
    """However many are listed, and asked for twice."""
    places = Places({1: 0.5, 9: 0.2}, {1: 0.9, 2: 0.3, 30: 0.1})
    for _ in range(2):
        assert places.of((1,)) == Place(0.5, 1.0)
        assert places.of((0, 1)) == Place(0.5, 0.9)
        assert places.of((2, 3)) == Place(1.0, 1.0)
        assert places.of(range(16)) == Place(0.2, 0.3)
        assert places.of(range(16, 32)) == Place(1.0, 0.1)


def test_files(tmp_path: Path) -> None:
    """Speeds are kept, with ranks as text; a file without them says nothing of them, and means what it meant."""
    cost = a_cost_model(rank_speeds={0: 0.7, 12: 0.5}, link_speeds={8: 0.25})
    cost.save(tmp_path / "cost.json")
    data = json.loads((tmp_path / "cost.json").read_text())
    assert data["rank_speeds"] == {"0": 0.7, "12": 0.5}
    assert data["link_speeds"] == {"8": 0.25}
    assert CostModel.load(tmp_path / "cost.json") == cost
    assert not {"rank_speeds", "link_speeds"} & set(a_cost_model().to_dict())
    for name in shipped_names():
        assert not CostModel.load(name).is_uneven


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_speeds": {"1": 0}}, "rank_speeds of rank 1 is 0; a speed is a share of what the cost model says"),
        ({"rank_speeds": {"1": 1.5}}, "rank_speeds of rank 1 is 1.5; .* of the fastest ranks and links"),
        ({"link_speeds": {"2": -0.5}}, "link_speeds is .* must be 0 or more"),
        ({"link_speeds": {"2": 1e-9}}, "link_speeds of rank 2 is 1e-09"),
        ({"rank_speeds": {"-1": 0.5}}, "rank_speeds has the rank '-1'; a rank is a whole number from 0 on"),
        ({"rank_speeds": {"01": 0.5}}, "the rank '01'"),
        ({"rank_speeds": [1, 0.5]}, "it must be an object, rank -> number"),
        ({"rank_speeds": {"1": "0.5"}}, "rank_speeds is '0.5'; it must be a number"),
        ({"rank_speeds": {"1": True}}, "it must be a number"),
    ],
)
def test_what_is_no_speed_is_refused(changes: dict[str, Any], message: str) -> None:
    """With the field, the rank and the value."""
    with pytest.raises(ConfigError, match=message):
        CostModel.from_dict({**a_cost_model().to_dict(), **changes})
    with pytest.raises(ConfigError, match="rank_speeds of rank -1"):
        a_cost_model(rank_speeds={-1: 0.5})
