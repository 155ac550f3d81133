"""The file of a cost model is its JSON, read strictly: a wrong file is named, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from costs.test_cost_model import RECOMPUTE, a_cost_model, with_policies
from hypothesis import given
from hypothesis import strategies as st

from hf_hetero import CostModel, HeteroConfig, HeteroError
from hf_hetero.costs import ActivationPolicy, shipped_names
from hf_hetero.errors import ConfigError

NUMBERS = st.floats(1e-6, 1e6) | st.integers(1, 10**9)
BY_DEGREE = st.dictionaries(st.integers(1, 4096), NUMBERS, max_size=4)
SPEEDS = st.dictionaries(st.integers(0, 4096), st.floats(1e-3, 1), max_size=4)
POLICIES = st.dictionaries(
    st.sampled_from(["recompute", "offload"]),
    st.builds(ActivationPolicy, NUMBERS, st.just(1), st.just(1), st.floats(1, 4), NUMBERS),
)
COST_MODELS = st.builds(
    CostModel,
    attention_s_per_token2=st.floats(0, 1),
    linear_s_per_token=st.floats(0, 1),
    micro_batch_s=NUMBERS,
    all_to_all_bytes_per_token=NUMBERS,
    all_to_all_bytes_per_s=BY_DEGREE,
    activation_bytes_per_token=NUMBERS,
    model_state_bytes_per_rank=NUMBERS,
    memory_bytes_per_rank=st.floats(1e10, 1e12),
    all_to_all_latency_s=BY_DEGREE,
    ranks_per_node=st.none() | st.integers(1, 64),
    kv_bytes_per_token=st.none() | NUMBERS,
    num_heads=st.none() | st.integers(1, 128),
    num_kv_heads=st.none() | st.integers(1, 128),
    network_bytes_per_s=st.none() | NUMBERS,
    ring_overlap=st.floats(0, 1),
    query_bytes_per_token=st.none() | NUMBERS,
    both_ways_overlap=st.none() | st.floats(0, 1),
    activation_policies=POLICIES,
    host_memory_bytes_per_rank=st.none() | NUMBERS,
    rank_speeds=SPEEDS,
    link_speeds=SPEEDS,
    name=st.text(max_size=8),
    source=st.text(max_size=8),
)


@given(COST_MODELS)
def test_any_cost_model_is_its_json(cost: CostModel) -> None:
    """Through text and back, each field is what it was; what is None is absent."""
    data = cost.to_dict()
    assert CostModel.from_dict(json.loads(json.dumps(data))) == cost
    assert None not in data.values()


def test_round_trip(tmp_path: Path) -> None:
    """Save and load give the same model; the file has the documented format and string degrees."""
    cost = with_policies(name="n", source="s", ranks_per_node=8, host_memory_bytes_per_rank=900)
    assert "activation_policies" not in a_cost_model().to_dict()
    cost.save(tmp_path / "cost.json")
    data = json.loads((tmp_path / "cost.json").read_text())
    assert data["format"] == "hf-hetero-cost/1"
    assert data["all_to_all_bytes_per_s"] == {"2": 1e6, "4": 5e5}
    assert CostModel.load(tmp_path / "cost.json") == cost


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where writing fails half way, the file before it is still there, and nothing beside it."""
    before = a_cost_model(name="before")
    before.save(tmp_path / "cost.json")
    whole = Path.write_text

    def half(path: Path, text: str, **options: Any) -> int:
        whole(path, text[: len(text) // 2], **options)
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        a_cost_model(name="after").save(tmp_path / "cost.json")
    assert CostModel.load(tmp_path / "cost.json") == before
    assert [path.name for path in tmp_path.iterdir()] == ["cost.json"]


@pytest.mark.parametrize("name", ["recompute", "offload"])
@pytest.mark.parametrize("bytes_per_token", [1006, 1e15])
def test_a_policy_without_room_is_left_out(name: str, bytes_per_token: float) -> None:
    """What holds no token is nothing to choose; the rest of the cost model plans as if it were not there."""
    policy = ActivationPolicy(**{**RECOMPUTE, "activation_bytes_per_token": bytes_per_token})
    cost = a_cost_model(activation_policies={name: policy})
    assert list(cost.by_activations) == [None]
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


def test_a_field_twice_and_a_file_too_deep(tmp_path: Path) -> None:
    """Of two values of one field none is guessed; what cannot be read is said, whatever the reason."""
    text = json.dumps(a_cost_model().to_dict())
    (tmp_path / "twice.json").write_text(text[:-1] + ', "micro_batch_s": 5.0}')
    with pytest.raises(ConfigError, match="the field 'micro_batch_s' stands there twice"):
        CostModel.load(tmp_path / "twice.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="nested too deep"):
        CostModel.load(tmp_path / "deep.json")
