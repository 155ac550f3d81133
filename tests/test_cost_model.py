"""The cost model is the documented formula, the file is its JSON, and a wrong file is named."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from hf_hetero import CostModel, Group, HeteroConfig, HeteroError, MicroBatch, Plan
from hf_hetero.activation_policy import ActivationPolicy
from hf_hetero.cost_model import shipped_names
from hf_hetero.errors import ConfigError

SHARED = Path(__file__).parents[2] / "shared"


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
    assert {name: under.capacity_tokens for name, under in cost.under.items()} == {
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
    assert list(with_policies(host_memory_bytes_per_rank=600).under) == [None, "recompute"]  # offload would hold fewer
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


def test_round_trip(tmp_path: Path) -> None:
    """Save and load give the same model; the file has the documented format and string degrees."""
    cost = with_policies(name="n", source="s", ranks_per_node=8, host_memory_bytes_per_rank=900)
    assert "activation_policies" not in a_cost_model().to_dict()
    cost.save(tmp_path / "cost.json")
    data = json.loads((tmp_path / "cost.json").read_text())
    assert data["format"] == "hf-hetero-cost/1"
    assert data["all_to_all_bytes_per_s"] == {"2": 1e6, "4": 5e5}
    assert CostModel.load(tmp_path / "cost.json") == cost


@pytest.mark.parametrize("name", ["recompute", "offload"])
@pytest.mark.parametrize("bytes_per_token", [1006, 1e15])
def test_a_policy_without_room_is_left_out(name: str, bytes_per_token: float) -> None:
    """What holds no token is nothing to choose; the rest of the cost model plans as if it were not there."""
    policy = ActivationPolicy(**{**RECOMPUTE, "activation_bytes_per_token": bytes_per_token})
    cost = a_cost_model(activation_policies={name: policy})
    assert list(cost.under) == [None]
    assert cost.leanest.capacity_tokens == cost.capacity_tokens == 100


def test_missing_latency_is_none() -> None:
    """A file without the optional fields means no latency."""
    data = a_cost_model().to_dict()
    del data["all_to_all_latency_s"]
    assert CostModel.from_dict(data).seconds([], 4) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "hf-hetero-cost/7"}, "hf-hetero-cost/7"),
        ({"linear_s_per_token": -1}, "linear_s_per_token is -1"),
        ({"micro_batch_s": float("nan")}, "micro_batch_s is nan"),
        ({"all_to_all_bytes_per_s": {"2": 0}}, "all_to_all_bytes_per_s must be above 0"),
        ({"all_to_all_bytes_per_s": {"two": 1}}, "two"),
        ({"memory_bytes_per_rank": 100}, "holds no token"),
        ({"activation_bytes_per_token": 0}, "activation_bytes_per_token must be above 0"),
        ({"memory_bytes_per_rank": 0}, "holds no token"),
        ({"micro_batch_s": "0.5"}, "micro_batch_s is '0.5'; it must be a number"),
        ({"micro_batch_s": True}, "micro_batch_s is True; it must be a number"),
        ({"micro_batch_s": None}, "micro_batch_s is None; it must be a number"),
        ({"micro_batch_s": 10**400}, r"micro_batch_s is 100000000000\.\.\.; that is too large"),
        ({"all_to_all_bytes_per_s": [1, 2]}, r"all_to_all_bytes_per_s is \[1, 2\]; it must be an object"),
        ({"all_to_all_bytes_per_s": {"2": "fast"}}, "all_to_all_bytes_per_s is 'fast'; it must be a number"),
        ({"all_to_all_bytes_per_s": {"2.5": 1}}, "the degree '2.5'; a degree is a positive whole number"),
        ({"all_to_all_bytes_per_s": {"0": 1}}, "has a degree below 1"),
        ({"all_to_all_latency_s": {"-2": 1}}, "the degree '-2'"),
        ({"all_to_all_latency_s": {"2": -1}}, "all_to_all_latency_s is .* must be 0 or more"),
        ({"ranks_per_node": 0}, "ranks_per_node is 0; it must be a positive whole number"),
        ({"ranks_per_node": 8.0}, "ranks_per_node is 8.0; it must be a positive whole number"),
        ({"name": 7}, "name is 7; it must be text"),
        ({"activation_policies": [1]}, r"activation_policies is \[1\]; it must be an object"),
        ({"activation_policies": {"recompute": 2}}, r"activation_policies\.recompute is 2; it must be an object"),
        ({"activation_policies": {"recompute": {}}}, r"activation_policies\.recompute: .*missing 3 required"),
        ({"activation_policies": {"forget": RECOMPUTE}}, r"activation_policies has \['forget'\]"),
        (
            {"activation_policies": {"recompute": {**RECOMPUTE, "exchanges": "1"}}},
            r"recompute\.exchanges is '1'; it must be a number",
        ),
        (
            {"activation_policies": {"recompute": {**RECOMPUTE, "activation_bytes_per_token": 0}}},
            "activation policy's activation_bytes_per_token must be above 0",
        ),
        (
            {"activation_policies": {"recompute": {**RECOMPUTE, "linear_s_per_token": 0.0009}}},
            "activation policy 'recompute' takes less time than none",
        ),
        (
            {"activation_policies": {"recompute": {**RECOMPUTE, "linear_s_per_token": -1}}},
            "activation policy's linear_s_per_token is -1; it must be 0 or more",
        ),
    ],
)
def test_wrong_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """A value that cannot be is named, and so is its file."""
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({**a_cost_model().to_dict(), **changes}))
    with pytest.raises(ConfigError, match=message) as caught:
        CostModel.load(path)
    assert "wrong.json" in str(caught.value)
    assert isinstance(caught.value, HeteroError)


def test_missing_field_and_no_json(tmp_path: Path) -> None:
    """So are a missing field, broken JSON and a missing file."""
    data = a_cost_model().to_dict()
    del data["micro_batch_s"]
    del data["linear_s_per_token"]
    with pytest.raises(ConfigError, match="cost model lacks linear_s_per_token, micro_batch_s"):
        CostModel.from_dict(data)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken\.json is not JSON"):
        CostModel.load(tmp_path / "broken.json")
    (tmp_path / "broken.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"broken\.json is not JSON"):
        CostModel.load(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"list\.json holds a list"):
        CostModel.load(tmp_path / "list.json")
    with pytest.raises(ConfigError, match="No such file"):
        CostModel.load(tmp_path / "absent.json")


def test_shipped_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shipped name loads from anywhere, also for a run's configuration; `./name` is the file of that name."""
    monkeypatch.chdir(tmp_path)
    name = shipped_names()[0]
    assert CostModel.load(name).name == name
    assert CostModel.load(str(HeteroConfig(cost_model=name).cost_model)) == CostModel.load(name)
    a_cost_model().save(tmp_path / name)
    assert CostModel.load(name).name == name
    assert CostModel.load(f"./{name}") == a_cost_model()


def test_unknown_name() -> None:
    """A name that is neither a file nor shipped is refused with the names there are."""
    with pytest.raises(ConfigError, match=r"'h100'.*No such file") as caught:
        CostModel.load("h100")
    for name in shipped_names():
        assert name in str(caught.value)


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


def test_a_field_twice_and_a_file_too_deep(tmp_path: Path) -> None:
    """Of two values of one field none is guessed; what cannot be read is said, whatever the reason."""
    text = json.dumps(a_cost_model().to_dict())
    (tmp_path / "twice.json").write_text(text[:-1] + ', "micro_batch_s": 5.0}')
    with pytest.raises(ConfigError, match="the field 'micro_batch_s' stands there twice"):
        CostModel.load(tmp_path / "twice.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="nested too deep"):
        CostModel.load(tmp_path / "deep.json")
