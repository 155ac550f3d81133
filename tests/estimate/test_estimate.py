"""A cost model from operations, bytes and speeds: what exchanges, sharding and policies cost in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from estimate.test_operations import shape
from helpers import tiny_model

from hf_hetero import CostModel, HeteroConfig, Plan, Planner, Topology
from hf_hetero.estimate.devices import Device, device_named
from hf_hetero.estimate.estimate import attention_s, estimate_cost_model, gather_s, linear_s, optimizer_s, replicas_s
from hf_hetero.estimate.first_estimate import restricted
from hf_hetero.estimate.memory import Shards, boundary_bytes, gathered_bytes, model_state_bytes
from hf_hetero.estimate.model_shape import ModelShape, shape_of
from hf_hetero.estimate.operations import attention_flops, linear_flops, traffic_bytes
from hf_hetero.estimate.shares import reached
from hf_hetero.plan import ACTIVATIONS

DEVICE = Device("test", 1e12, 1e10, network_bytes_per_s=1e9)


def test_seconds_of_a_token() -> None:
    """Products, what passes through memory, and, where attention is slow to begin, some tokens' worth of it."""
    plain = shape()
    assert linear_s(plain, DEVICE) == linear_flops(plain) / 1e12
    device = replace(DEVICE, attention_flops=5e11, attention_tokens=100, card_bytes_per_s=1e11)
    assert attention_s(plain, device) == attention_flops(plain) / 5e11
    moved_s, begun_s = traffic_bytes(plain) / 1e11, 100 * attention_s(plain, device)
    assert linear_s(plain, device) == pytest.approx(linear_flops(plain) / 1e12 + moved_s + begun_s)
    cost = estimate_cost_model(plain, device, Topology(2, None, 2**30), (1, 2))
    assert (cost.linear_s_per_token, cost.attention_s_per_token2) == (
        linear_s(plain, device),
        attention_s(plain, device),
    )
    assert optimizer_s(plain, device, 2) == 40 * plain.num_params / 2 / 1e11
    assert optimizer_s(plain, DEVICE, 2) == 0  # nothing is known of its memory


def test_gathering_by_switched_links() -> None:
    """An all-gather of a node is twice as fast as an all-to-all where cards are switched, and as fast elsewhere."""
    topology = Topology(8, None, 2**30)
    nvlink, pcie = (device_named(name) for name in ("H100", "H100 PCIe"))
    moved = 0.5 * 3 * shape().num_params * 4 * (7 / 8)
    assert gather_s(shape(), nvlink, topology) == pytest.approx(moved / 360e9)
    assert gather_s(shape(), pcie, topology) == pytest.approx(moved / 12e9)


def test_replicas_gather_among_themselves() -> None:
    """Weights come from the ranks of the replica: inside a node by its links, across nodes over the node's network."""
    nodes, weights = Topology(16, 8, 2**30), shape().num_params * 4
    slow = replace(DEVICE, network_bytes_per_s=1e8)
    whole = 0.5 * 3 * weights * (15 / 16) / 8e8
    assert gather_s(shape(), slow, nodes) == pytest.approx(whole)
    assert gather_s(shape(), slow, nodes, replicas=2) == pytest.approx(0.5 * 3 * weights * (7 / 8) / 1e10)
    assert gather_s(shape(), slow, nodes, replicas=4) == pytest.approx(0.5 * 3 * weights * (3 / 4) / 1e10)
    # replicas of 3 on nodes of 8: one of them lies on both sides
    assert gather_s(shape(), slow, Topology(24, 8, 2**30), replicas=8) == pytest.approx(
        0.5 * 3 * weights * (2 / 3) / 8e8
    )
    # replicas of 16 on nodes of 8
    assert gather_s(shape(), slow, Topology(32, 8, 2**30), replicas=2) == pytest.approx(whole)


def test_replicas_add_up_their_gradients() -> None:
    """A ring sends each part twice; where nodes part replicas, its share of the node's network limits it."""
    model, slow = shape(), replace(DEVICE, network_bytes_per_s=1e8)
    part = model.trainable_params * 4 / 8
    assert replicas_s(model, slow, Topology(16, 8, 2**30), 1) == 0
    assert replicas_s(model, slow, Topology(16, 8, 2**30), 2) == pytest.approx(0.5 * 2 * part * (1 / 2) / 1e8)
    assert replicas_s(model, slow, Topology(32, 8, 2**30), 4) == pytest.approx(0.5 * 2 * part * (3 / 4) / 1e8)
    # four replicas of four ranks, two in a node: four rings pass each node
    assert replicas_s(model, slow, Topology(16, 8, 2**30), 4) == pytest.approx(0.5 * 2 * 2 * part * (3 / 4) / 2e8)
    # all in one node
    assert replicas_s(model, slow, Topology(16, 16, 2**30), 2) == pytest.approx(0.5 * 2 * part * (1 / 2) / 1e10)
    adapters = replace(model, trainable_params=model.num_params // 100)
    assert replicas_s(adapters, slow, Topology(16, 8, 2**30), 2) == pytest.approx(
        replicas_s(model, slow, Topology(16, 8, 2**30), 2) * adapters.trainable_params / model.trainable_params
    )


def test_replicas_in_a_cost_model() -> None:
    """Each holds all states in as many parts as it has ranks; a micro-batch has its sums of gradients, or not."""
    nodes = Topology(16, 8, 2**30)

    def estimated(**changes: Any) -> CostModel:
        return estimate_cost_model(shape(), DEVICE, nodes, nodes.degrees, Shards(**changes))

    one, two, once = estimated(), estimated(replicas=2), estimated(replicas=2, reduces_once=True)
    states = model_state_bytes(shape())
    assert two.model_state_bytes_per_rank - one.model_state_bytes_per_rank == pytest.approx(states * (1 / 8 - 1 / 16))
    assert two.micro_batch_s - once.micro_batch_s == pytest.approx(replicas_s(shape(), DEVICE, nodes, 2))
    gathered = gather_s(shape(), DEVICE, nodes) - gather_s(shape(), DEVICE, nodes, 2)
    assert one.micro_batch_s - once.micro_batch_s == pytest.approx(gathered)
    assert once.model_state_bytes_per_rank == two.model_state_bytes_per_rank
    assert "in 2 replicas" in two.source
    assert "replicas" not in one.source
    # nothing else: what a group costs is a matter of nodes, not of replicas
    alike = {"source": "", "micro_batch_s": 1.0, "model_state_bytes_per_rank": 1.0}
    assert replace(two, **alike) == replace(one, **alike)


def test_plans_stay_in_the_node_that_is_a_replica() -> None:
    """Samples that a node's ranks hold are shared inside it, so inside a replica; one that they do not hold is not."""
    device = replace(DEVICE, network_bytes_per_s=1e7)
    nodes = Topology(16, 8, 2**26)
    cost = estimate_cost_model(shape(), device, nodes, nodes.degrees, Shards(replicas=2))
    most = cost.capacity_tokens
    planner = Planner(cost, 16, solver="fast")
    lengths = [most * eighths // 8 for eighths in (1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 62)]

    def replicas_of(plan: Plan) -> list[int]:
        groups = [group for micro_batch in plan.micro_batches for group in micro_batch.groups if group.samples]
        return [len({rank // 8 for rank in group.ranks}) for group in groups]

    assert set(replicas_of(planner.plan(lengths))) == {1}
    assert 2 in replicas_of(planner.plan([*lengths, 9 * most]))


def test_says_what_it_assumed() -> None:
    """The source names sizes, speeds and memory, and that nothing was measured."""
    cost = estimate_cost_model(shape(), DEVICE, Topology(8, 4, 2**30), (1, 2, 4, 8))
    for words in ("not measured", "checkpointing off", "TFLOP/s", "GB/s", "GiB a rank"):
        assert words in cost.source


def test_exchange_speed() -> None:
    """Across nodes, the share that leaves the node waits for the network; shared key-value heads travel more than once.

    The tiny model has 4 heads and 2 key-value heads: on 4 ranks each key-value head goes to two of them.
    """
    cost = estimate_cost_model(shape(), DEVICE, Topology(4, 2, 2**30), (1, 2, 4))
    assert cost.all_to_all_bytes_per_s == {2: 1e10, 4: pytest.approx(1e9 / (1 - 2 / 4) * (4 + 2) / (4 + 4))}
    one_node = estimate_cost_model(shape(), DEVICE, Topology(4, None, 2**30), (1, 2, 4))
    assert one_node.all_to_all_bytes_per_s[4] == pytest.approx(1e10 * (4 + 2) / (4 + 4))


def gpt_7b() -> ModelShape:
    """FlexSP's GPT-7B with 192K positions: 64 heads, 7.12B weights (arXiv:2412.01523, released solver)."""
    full = shape()
    sizes = {"num_layers": 32, "hidden": 4096, "heads": 64, "kv_heads": 64, "head_dim": 64, "intermediate": 16384}
    count = int(7.12e9)
    weights = {"num_params": count, "active_params": count, "trainable_params": count, "param_bytes": 4 * count}
    return replace(full, **sizes, **weights, element_bytes=2)


def test_against_flexsps_measurements() -> None:
    """Their testbed's fixed cost within a quarter, its all-to-all across nodes within a sixth, of what they measured.

    8 nodes of 8 A100, 400 Gb/s a node: three quarters of it, divided by 8 ranks, are 4.7 GB/s a rank.
    """
    topology = Topology(64, 8, 40 * 10**9)
    device = replace(reached(device_named("A100"), "fa2"), network_bytes_per_s=0.75 * 50e9 / 8)
    cost = estimate_cost_model(gpt_7b(), device, topology, (1, 8, 16, 32, 64), Shards())
    published = CostModel.load("gpt-7b_64xa100_192k")
    assert cost.micro_batch_s == pytest.approx(published.micro_batch_s, rel=0.25)
    for degree in (8, 16, 32, 64):
        measured = published.all_to_all_bytes_per_s[degree]
        assert cost.all_to_all_bytes_per_s[degree] == pytest.approx(measured, rel=0.16)
    assert cost.all_to_all_bytes_per_token == published.all_to_all_bytes_per_token


def test_sharded_states() -> None:
    """Sharding divides the states by the ranks, adds what is gathered, and each micro-batch pays for gathering."""
    options: tuple[Any, ...] = (shape(), DEVICE, Topology(4, 2, 2**30), (1, 2, 4))
    whole, sharded = estimate_cost_model(*options), estimate_cost_model(*options, Shards())
    states = whole.model_state_bytes_per_rank / 4 + gathered_bytes(shape())
    assert sharded.model_state_bytes_per_rank == pytest.approx(states)
    # three times the weights less the own quarter, through a node's two links of 1 GB/s, half of it exposed
    moved_s = 0.5 * 3 * shape().num_params * 4 * (3 / 4) / 2e9
    assert sharded.micro_batch_s - whole.micro_batch_s == pytest.approx(moved_s)
    assert sharded.linear_s_per_token == whole.linear_s_per_token
    offloaded = estimate_cost_model(*options, Shards(offloaded=True))
    assert offloaded.model_state_bytes_per_rank == pytest.approx(gathered_bytes(shape()))
    added_up = estimate_cost_model(*options, Shards(whole_gradients=True))
    assert added_up.model_state_bytes_per_rank == pytest.approx(states + shape().trainable_params * 4)


def test_policies() -> None:
    """Each holds more tokens than the one before and takes no less time; what is offloaded fits the host."""
    topology = Topology(8, None, 2**34)
    model = tiny_model(hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
    big = shape_of(model, model.config, 2, False, True, True, True)
    cost = estimate_cost_model(big, DEVICE, topology, (1, 2, 4, 8), None, ACTIVATIONS)
    plain, recompute, offload = cost.by_activations.values()
    assert plain.capacity_tokens * 4 < recompute.capacity_tokens < offload.capacity_tokens / 1.5
    worked = big.num_params - big.looked_up_params
    again = 2 * (worked - big.head_params) / (6 * worked)  # of the layers alone
    assert plain.linear_s_per_token * (1 + again) == pytest.approx(recompute.linear_s_per_token)
    assert recompute.linear_s_per_token == offload.linear_s_per_token  # copies hide
    slow = replace(DEVICE, host_bytes_per_s=1e7)
    waits = estimate_cost_model(big, slow, topology, (1, 2, 4, 8), None, ACTIVATIONS).by_activations["offload"]
    assert waits.linear_s_per_token == pytest.approx(2 * 12 * boundary_bytes(big) / 1e7)
    small = estimate_cost_model(big, DEVICE, replace(topology, host_memory_bytes=12 * 10**9), (1, 2), None, ACTIVATIONS)
    host_bytes = cost.activation_policies["offload"].host_bytes_per_token
    assert recompute.capacity_tokens < small.leanest.capacity_tokens == int(12e9 / host_bytes)
    recomputes = replace(big, checkpointing=True)
    same = estimate_cost_model(recomputes, DEVICE, topology, (1, 2), None, ["offload"])
    assert same.capacity_tokens == recompute.capacity_tokens
    assert same.leanest.capacity_tokens == offload.capacity_tokens
    assert restricted(cost, HeteroConfig(), 8, 8, ["recompute"]).leanest.capacity_tokens == recompute.capacity_tokens
    assert restricted(cost, HeteroConfig(), 8, 8).leanest.capacity_tokens == plain.capacity_tokens
