"""The cost model is the documented formula."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from hf_hetero import CostModel, Group, MicroBatch, Plan
from hf_hetero.costs import ActivationPolicy
from hf_hetero.errors import ConfigError

SHARED = Path(__file__).parents[3] / "shared"


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


RECOMPUTE: dict[str, Any] = {
    "activation_bytes_per_token": 4,
    "attention_s_per_token2": 1.5e-6,
    "linear_s_per_token": 2e-3,
    "exchanges": 1.5,
}
OFFLOAD: dict[str, Any] = {**RECOMPUTE, "activation_bytes_per_token": 1, "host_bytes_per_token": 3}


def with_policies(**changes: Any) -> CostModel:
    policies = {"recompute": ActivationPolicy(**RECOMPUTE), "offload": ActivationPolicy(**OFFLOAD)}
    return a_cost_model(activation_policies=policies, **changes)


def test_policies() -> None:
    """Seconds and tokens of groups that hold more, by hand; each holds more than the one before; host memory counts."""
    cost = with_policies()
    assert {name: model.capacity_tokens for name, model in cost.by_activations.items()} == {
        None: 100,
        "recompute": 251,
        "offload": 1005,
    }
    group = Group((0, 1), (0, 1), activations="recompute")
    two = 0.5 + (1.5e-6 * 50000 + 2e-3 * 300) / 2 + 1.5 * 1000 * 300 / 2 / 1e6
    assert (
        cost.group_seconds(group, [100, 200])
        == pytest.approx(two)
        == pytest.approx(sum(cost.charges(group, [100, 200])))
    )
    assert cost.group_seconds(Group((0, 1), (0, 1)), [100, 200]) == a_cost_model().seconds([100, 200], 2)
    small_host = with_policies(host_memory_bytes_per_rank=900)
    assert small_host.leanest.capacity_tokens == 300
    smaller_host = with_policies(host_memory_bytes_per_rank=600)
    assert list(smaller_host.by_activations) == [None, "recompute"]  # offload would hold fewer
    assert cost.with_capacity(70).leanest.capacity_tokens == 70  # a user's limit is one
    with pytest.raises(ConfigError, match=r"ranks \[0, 1\] has activations 'recompute', about which .* says nothing"):
        a_cost_model().group_seconds(group, [100, 200])


def test_formula() -> None:
    """Seconds and bytes as the docstring has them, computed here by hand."""
    cost = a_cost_model()
    assert cost.seconds([100, 200], 1) == pytest.approx(0.5 + 1e-6 * (100**2 + 200**2) + 1e-3 * 300)
    two = 0.5 + (1e-6 * 50000 + 1e-3 * 300) / 2 + 1000 * 300 / 2 / 1e6
    assert cost.seconds([100, 200], 2) == pytest.approx(two)
    assert cost.seconds([], 4) == pytest.approx(0.75)
    assert cost.num_bytes([30, 10], 4) == pytest.approx(100 + 10 * 40 / 4)
    assert cost.capacity_tokens == 100


def test_degrees() -> None:
    """1 is always offered; others are those with a bandwidth."""
    assert a_cost_model().degrees(3) == (1, 2)
    assert a_cost_model().degrees(4) == (1, 2, 4)
    assert a_cost_model().with_degrees(d for d in (1, 2, 4) if d > 2).degrees(8) == (1, 4)


def test_capacity_is_exact() -> None:
    """A limit in tokens gives that many tokens, whatever the bytes of a token."""
    for tokens in (1, 7, 4096, 99991):
        assert a_cost_model(activation_bytes_per_token=10.7).with_capacity(tokens).capacity_tokens == tokens


def test_latency_without_bandwidth_is_no_offer() -> None:
    """A file may hold latencies of degrees that it does not offer: they change nothing."""
    data = {**a_cost_model().to_dict(), "all_to_all_latency_s": {"4": 0.25, "16": 9.0}}
    cost = CostModel.from_dict(data)
    assert cost.degrees(64) == (1, 2, 4)
    assert cost.seconds([50], 4) == a_cost_model().seconds([50], 4)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared cost models and judge")
def test_agrees_with_the_independent_judge() -> None:
    """Every shared cost model: the judge's seconds, capacity and degrees are ours."""
    spec = importlib.util.spec_from_file_location("score_plan", SHARED / "tools" / "score_plan.py")
    assert spec
    assert spec.loader
    judge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(judge)
    lengths = [812, 33, 7000, 1, 2048]
    for path in sorted((SHARED / "data" / "costs").glob("*.json")):
        ours, theirs = CostModel.load(path), judge.Cost(json.loads(path.read_text()))
        assert ours.capacity_tokens == theirs.capacity
        assert list(ours.degrees(64)) == theirs.degrees(64)
        for degree in ours.degrees(64):
            assert ours.seconds(lengths, degree) == pytest.approx(theirs.seconds(lengths, degree), rel=1e-12)
        groups = (Group((0, 1), (0, 2)), Group((2,), (1, 3)), Group((3,), (4,)))
        plan = Plan(4, (MicroBatch(groups),))
        assert ours.plan_seconds(plan, lengths) == pytest.approx(judge.plan_seconds(plan.to_dict(), lengths, theirs))


def test_where_it_comes_from() -> None:
    """Provenance and model survive JSON; a file without them is read, and written, as before; others are refused."""
    known = a_cost_model(provenance="measured", model="llama of 2 layers")
    assert CostModel.from_dict(json.loads(json.dumps(known.to_dict()))) == known
    assert not {"provenance", "model"} & set(a_cost_model().to_dict())
    with pytest.raises(ConfigError, match="provenance is 'guessed'; choose one of estimated, measured, refitted"):
        a_cost_model(provenance="guessed")


def test_layers_with_state() -> None:
    """A token of another rank costs time of its own, by degree: what a rank holds itself does not."""
    cost = a_cost_model(state_s_per_token={4: 0.01}, kv_bytes_per_token=8.0)
    plain = a_cost_model(kv_bytes_per_token=8.0)
    assert cost.seconds([100, 200], 4) == pytest.approx(plain.seconds([100, 200], 4) + 0.01 * 300 * 3 / 4)
    assert cost.seconds([100, 200], 2) == plain.seconds([100, 200], 2)
    assert cost.seconds([100, 200], 1) == plain.seconds([100, 200], 1)
    whole = Group((0, 1, 2, 3), (0, 1, 2, 3), "gather")  # each sample stays on one rank
    assert cost.group_seconds(whole, [10] * 4) == plain.group_seconds(whole, [10] * 4)
    cut = Group((0, 1, 2, 3), (0,), "gather")  # of 40 tokens the first rank has 10, and needs all others
    assert cost.group_seconds(cut, [40]) == pytest.approx(plain.group_seconds(cut, [40]) + 0.01 * 30)


def test_files_say_nothing_of_state_where_there_is_none() -> None:
    """A file without the field means what it always meant, and one is written only where there is something to say."""
    assert "state_s_per_token" not in a_cost_model().to_dict()
    with_state = a_cost_model(state_s_per_token={2: 1e-6})
    assert with_state.to_dict()["state_s_per_token"] == {"2": 1e-6}
    assert CostModel.from_dict(with_state.to_dict()) == with_state
