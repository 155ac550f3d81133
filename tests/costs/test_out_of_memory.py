"""What is left of a cost model once memory has run out: less than a rank held, enough for a sample that fitted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hf_hetero.costs import CostModel
from hf_hetero.costs.activation_policy import ActivationPolicy
from hf_hetero.costs.out_of_memory import activation_bytes, fits, no_more_than, room_left, with_room
from hf_hetero.errors import ConfigError
from hf_hetero.plan import Group, MicroBatch, Plan
from hf_hetero.planner import Planner

COST = CostModel(
    attention_s_per_token2=1e-9,
    linear_s_per_token=1e-6,
    micro_batch_s=1e-3,
    all_to_all_bytes_per_token=100.0,
    all_to_all_bytes_per_s={2: 1e9, 4: 1e9},
    activation_bytes_per_token=10.0,
    model_state_bytes_per_rank=1000.0,
    memory_bytes_per_rank=2000.0,
    kv_bytes_per_token=4.0,
    num_heads=4,
    activation_policies={"recompute": ActivationPolicy(5.0, 2e-9, 2e-6)},
)
LENGTHS = [40, 30, 20, 90]


def plan(*groups: Group) -> Plan:
    return Plan(4, (MicroBatch(groups),))


ALL = Group((0, 1, 2, 3), (0, 1, 2, 3))


def test_the_capacity_is_below_what_was_held() -> None:
    """Nine tenths of what the rank held; other ways to hold more tokens lose as much."""
    lowered = with_room(COST, room_left(COST, plan(ALL), ALL, 60, LENGTHS))
    assert lowered.capacity_tokens == 54
    assert lowered.leanest.capacity_tokens == 108
    assert lowered.ran_out
    assert CostModel.from_dict(lowered.to_dict()) == lowered


def test_a_policy_is_judged_by_its_own_bytes() -> None:
    """60 tokens of a group that recomputes take half the bytes: what is left is half as much, too."""
    group = replace(ALL, activations="recompute")
    assert room_left(COST, plan(group), group, 60, LENGTHS) == int(0.9 * 60 * 5)


def test_what_was_gathered_counts() -> None:
    """Keys of other ranks are held as well, so that a rank which gathers held more than its own tokens."""
    group = replace(ALL, method="gather")
    gathered = activation_bytes(COST, group, 45, LENGTHS) - activation_bytes(COST, ALL, 45, LENGTHS)
    assert gathered > 0
    assert room_left(COST, plan(group), group, 45, LENGTHS) == int(0.9 * (450 + gathered))


@pytest.mark.parametrize(("tokens", "capacity"), [(100, 90), (95, 90), (91, 90), (90, 81)])
def test_the_longest_sample_keeps_its_room(tokens: int, capacity: int) -> None:
    """A sample of 90 tokens on one rank: it has room left where more was held, and none where it was all."""
    alone = replace(COST, all_to_all_bytes_per_s={}, activation_policies={})
    group = Group((0,), (3,))
    single = Plan(1, (MicroBatch((Group((0,), (0, 1, 2, 3)),)),))
    assert with_room(alone, room_left(alone, single, group, tokens, LENGTHS)).capacity_tokens == capacity


def test_it_ends() -> None:
    """However often memory runs out, and even where no token was held, each time less is left, until nothing is."""
    cost, rooms = COST, []
    for tokens in [100, 0, 0, 60, 60, 1000, 3, 2, 1, 1]:
        room = room_left(cost, plan(ALL), ALL, tokens, [4])
        rooms.append(room)
        cost = with_room(cost, room) if room >= 10 else cost
    assert rooms == sorted(rooms, reverse=True)
    assert len(set(rooms[:-2])) == len(rooms[:-2])
    with pytest.raises(ConfigError, match="no token"):
        with_room(COST, 4)


def test_no_more_than_was_kept() -> None:
    """A file or a setting that says more than has proven too much is held to that; one that says less stays."""
    kept = with_room(COST, 333)
    assert no_more_than(COST, kept).capacity_tokens == kept.capacity_tokens == 33
    small = COST.with_capacity(20)
    assert no_more_than(small, kept) is small
    other = replace(COST, activation_bytes_per_token=math.pi)
    assert no_more_than(other, kept).capacity_tokens == 33


def test_plans_fit_the_model_they_were_made_by() -> None:
    """A planner's plan fits its own cost model, and one of much less memory only where it was made for that."""
    lengths = [90, 80, 70, 5, 3, 60, 55, 33, 20, 100] * 2
    small = with_room(COST, 300)
    for methods in (["ulysses"], ["gather", "ring", "ulysses"]):
        large_plan = Planner(COST, num_ranks=4, methods=methods).plan(lengths)
        small_plan = Planner(small, num_ranks=4, methods=methods).plan(lengths)
        assert fits(COST, large_plan, lengths)
        assert fits(small, small_plan, lengths)
        assert fits(COST, small_plan, lengths)
        assert not fits(small, large_plan, lengths)


def test_images_have_no_claim_to_room() -> None:
    """A sample that is planned as more than its tokens, for its images, keeps the room of its tokens only."""
    alone = replace(COST, all_to_all_bytes_per_s={}, activation_policies={})
    group, single = Group((0,), (3,)), Plan(1, (MicroBatch((Group((0,), (0, 1, 2, 3)),)),))
    planned = [*LENGTHS[:3], LENGTHS[3] + 5]
    assert room_left(alone, single, group, 100, planned) == 950
    assert room_left(alone, single, group, 100, planned, max(LENGTHS)) == 900
