"""An estimate knows the layers that carry state: what they compute, and what travels for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hybrids import HYBRIDS, hybrid_model

from hf_hetero import Planner
from hf_hetero.estimate.devices import Device
from hf_hetero.estimate.estimate import estimate_cost_model
from hf_hetero.estimate.model_shape import ModelShape, shape_of
from hf_hetero.estimate.state_layers import fetched_bytes, state_shape, with_state_layers
from hf_hetero.topology import Topology

DEVICE = Device("test", 1e12, 1e9)
DEGREES = (1, 2, 4, 8)


def shapes_of(family: str, **changes: Any) -> tuple[ModelShape, Any]:
    model = hybrid_model(family)
    shape = shape_of(model, model.config, 2, checkpointing=False)
    return replace(shape, **changes), state_shape(model, model.config)


def test_what_a_model_has() -> None:
    """One of two layers attends, and one carries state: its weights, and the numbers of its state."""
    _, states = shapes_of("qwen3_5")
    assert states is not None
    assert (states.num_mixers, states.attending) == (1, 0.5)
    in_proj, conv, out_proj, others = 32 * (2 * 32 + 64 + 64 + 8 + 8), 128 * 4, 64 * 32, 8 + 8 + 8
    assert states.weights == in_proj + conv + out_proj + others
    assert states.numbers == 8 * 8 * 8


@pytest.mark.parametrize("family", list(HYBRIDS))
def test_every_family_is_counted(family: str) -> None:
    """Each of them has a share of layers that attend, and, but for short convolutions, a state."""
    _, states = shapes_of(family)
    assert states is not None
    alone = family in ("mamba", "mamba2", "falcon_mamba")
    assert states.attending == (0.0 if alone else 1.0 if family == "falcon_h1" else 0.5)
    assert (states.numbers > 0) == (states.weights > 0) == (states.num_mixers > 0) == (family != "lfm2")


def test_seconds_by_hand() -> None:
    """Attention is that of the layers that attend; a fetched token costs its bytes and its mixers."""
    shape, states = shapes_of("qwen3_5")
    before = estimate_cost_model(shape, DEVICE, Topology(8, None, 2**30), DEGREES)
    cost = with_state_layers(before, states, shape)
    assert cost.attention_s_per_token2 == before.attention_s_per_token2 / 2
    assert cost.all_to_all_bytes_per_token == before.all_to_all_bytes_per_token / 2
    assert cost.kv_bytes_per_token == before.kv_bytes_per_token / 2
    assert before.query_bytes_per_token is not None
    assert cost.query_bytes_per_token == before.query_bytes_per_token / 2
    a_weight_s = before.linear_s_per_token / shape.active_params
    worth = states.weights + 3 * 512
    assert cost.linear_s_per_token == pytest.approx(before.linear_s_per_token + a_weight_s * 3 * 512)
    speed = cost.all_to_all_bytes_per_s
    assert states.by_heads == (2, 4)  # of 4 key heads
    assert cost.state_s_per_token[4] == pytest.approx(2 * 2 * 32 * 2 / speed[4])
    assert cost.state_s_per_token[8] == pytest.approx(a_weight_s * worth + 2 * 32 * 2 / speed[8])
    ulysses = cost.seconds([100], 4) - replace(cost, state_s_per_token={}).seconds([100], 4)
    assert ulysses == pytest.approx(75 * cost.state_s_per_token[4])  # of 100 tokens a rank holds 25


def test_bytes_by_hand() -> None:
    """A rank keeps others' hidden states, and what mixers compute of them if they do so anew; with recompute once."""
    shape, states = shapes_of("qwen3_5")
    assert states.widths == 2 * 32 + 64 + 64 + 8 + 8 + 32
    assert fetched_bytes(states, shape, 4) == 32 * 2
    assert fetched_bytes(states, shape, 8) == (32 + 2 * states.widths) * 2
    three = replace(states, num_mixers=3, widths=3 * states.widths)
    recomputed = replace(shape, checkpointing=True)
    assert fetched_bytes(three, shape, 4) == 3 * 32 * 2
    assert fetched_bytes(three, recomputed, 4) == 32 * 2
    assert fetched_bytes(three, replace(recomputed, keeps_exchanged=True), 4) == (3 * 2 * 32 + 32) * 2
    before = estimate_cost_model(shape, DEVICE, Topology(8, None, 2**30), DEGREES, policies=("recompute",))
    cost = with_state_layers(before, states, shape)
    more = cost.activation_bytes_per_token - before.activation_bytes_per_token
    assert more == 7 * fetched_bytes(states, shape, 8)  # the eighth rank's own is counted anyway
    lean = with_state_layers(before.with_degrees((1, 2)), states, shape)
    assert lean.activation_bytes_per_token == before.activation_bytes_per_token + 32 * 2


def test_a_model_without_is_as_before() -> None:
    """Where no layer carries state, nothing changes."""
    shape, _ = shapes_of("qwen3_5")
    before = estimate_cost_model(shape, DEVICE, Topology(8, None, 2**30), DEGREES)
    assert with_state_layers(before, None, shape) is before


def test_the_planner_chooses_smaller_degrees() -> None:
    """What is not divided by the degree makes large groups dear; what is shared by heads, less so."""
    shape, states = shapes_of("qwen3_5", num_layers=32, hidden=1024, num_params=10**9, active_params=10**9)
    dear = replace(states, num_mixers=24, weights=5 * 10**8, by_heads=())
    before = estimate_cost_model(shape, DEVICE, Topology(8, None, 2**38), DEGREES)
    lengths = [20_000, 9_000, 9_000, 4_000, 4_000, 3_000, 2_000, 1_000]

    def mean_degree(cost: Any) -> float:
        groups = [group for group in Planner(cost, 8).plan(lengths).groups if group.samples]
        return sum(len(group.samples) * group.degree for group in groups) / len(lengths)

    whole = mean_degree(with_state_layers(before, dear, shape))
    by_heads = mean_degree(with_state_layers(before, replace(dear, by_heads=DEGREES), shape))
    assert whole < by_heads <= mean_degree(before)
