"""The estimate's operations and bytes are those of the model, and its plans respect the user's limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import tiny_model, with_lora

from hf_hetero import CostModel, HeteroConfig, Planner, Topology
from hf_hetero.estimate.estimate import (
    Device,
    attention_flops,
    cpu_device,
    estimate_cost_model,
    exchange_bytes,
    known_device,
    linear_flops,
)
from hf_hetero.estimate.memory import (
    Shards,
    activation_bytes,
    boundary_bytes,
    free_memory_bytes,
    gathered_bytes,
)
from hf_hetero.estimate.model_shape import ModelShape, shape_of
from hf_hetero.plan import ACTIVATIONS
from hf_hetero.trainer.machine import restricted

DEVICE = Device("test", 1e12, 1e10, network_bytes_per_s=1e9)


def shape(checkpointing: bool = False, lora: bool = False) -> ModelShape:
    model = tiny_model()
    return shape_of(with_lora(model) if lora else model, model.config, 4, checkpointing)


def test_linear_flops_are_six_a_weight() -> None:
    """6 N D for full training, 8 N D with recompute, about 4 N D with adapters."""
    num = sum(p.numel() for p in tiny_model().parameters())
    assert linear_flops(shape()) == 6 * num
    assert linear_flops(shape(checkpointing=True)) == 8 * num
    assert 4 * num < linear_flops(shape(lora=True)) < 4.5 * num


def test_attention_flops_match_a_count() -> None:
    """The quadratic part equals what torch counts for the two products of causal attention, halved and 3.5-fold."""
    from torch.utils.flop_counter import FlopCounterMode

    s, layers, heads, dim = 64, 2, 4, 8
    q = torch.randn(1, heads, s, dim)
    with FlopCounterMode(display=False) as counter:
        (q @ q.transpose(-1, -2)) @ q
    assert attention_flops(shape()) * s * s == pytest.approx(3.5 * layers * counter.get_total_flops() / 2)


def test_exchange_bytes() -> None:
    """Queries, keys, values and outputs of two layers, in fp32, forward and backward."""
    assert exchange_bytes(shape()) == 2 * (4 + 2 + 2 + 4) * 8 * 2 * 4


def test_kept_exchanges_cost_memory_and_save_traffic() -> None:
    """With recompute an exchange is made three times; kept, twice, for its tensors' memory in each layer."""
    model = tiny_model()
    repeats, keeps = (shape_of(model, model.config, 4, True, kept) for kept in (False, True))
    assert exchange_bytes(repeats) == 1.5 * exchange_bytes(keeps)
    assert activation_bytes(keeps) - activation_bytes(repeats) == (4 + 2 + 2 + 4) * 8 * 2 * 4
    whole = shape_of(model, model.config, 4, False, True)  # nothing is recomputed
    assert exchange_bytes(whole) == exchange_bytes(shape_of(model, model.config, 4, False, False))
    assert activation_bytes(whole) == activation_bytes(shape_of(model, model.config, 4, False, False))


def test_checkpointing_saves_memory_and_costs_time() -> None:
    """Recompute trades activations for operations."""
    assert activation_bytes(shape(checkpointing=True)) < activation_bytes(shape())
    assert linear_flops(shape(checkpointing=True)) > linear_flops(shape())


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
    device, topology = Device("A100", 312e12 * 0.45, 110e9, 0.75 * 50e9 / 8), Topology(64, 8, 40 * 10**9)
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


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8, 12])
def test_every_rank_count_can_be_planned(num_ranks: int) -> None:
    """On any number of ranks the estimate gives valid plans, up to a sample that needs all of them."""
    topology = Topology(num_ranks, None, 2**30)
    cost = estimate_cost_model(shape(), DEVICE, topology, topology.degrees)
    cost = restricted(cost, HeteroConfig(max_tokens_per_rank=100), num_ranks, num_heads=16)
    lengths = [100 * num_ranks, 3, 50, 99, 100, 1, 20]
    plan = Planner(cost, num_ranks=num_ranks).plan(lengths)
    assert plan.num_samples == len(lengths)
    for group in plan.groups:
        assert sum(lengths[s] for s in group.samples) <= 100 * group.degree


def test_limits() -> None:
    """max_degree, the number of heads and max_tokens_per_rank bind."""
    cost = estimate_cost_model(shape(), DEVICE, Topology(8, None, 2**30), (1, 2, 4, 8))
    assert restricted(cost, HeteroConfig(max_degree=2), 8, num_heads=32).degrees(8) == (1, 2)
    assert restricted(cost, HeteroConfig(), 8, num_heads=4).degrees(8) == (1, 2, 4, 8)
    assert restricted(cost, HeteroConfig(methods=["ulysses"]), 8, num_heads=4).degrees(8) == (1, 2, 4)
    assert restricted(replace(cost, kv_bytes_per_token=None), HeteroConfig(), 8, num_heads=4).degrees(8) == (1, 2, 4)
    assert restricted(cost, HeteroConfig(max_tokens_per_rank=77), 8, 32).capacity_tokens == 77


def test_policies() -> None:
    """Each holds more tokens than the one before and takes no less time; what is offloaded fits the host."""
    topology = Topology(8, None, 2**34)
    model = tiny_model(hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
    big = shape_of(model, model.config, 2, False, True, True, True)
    cost = estimate_cost_model(big, DEVICE, topology, (1, 2, 4, 8), None, ACTIVATIONS)
    plain, recompute, offload = cost.by_activations.values()
    assert plain.capacity_tokens * 4 < recompute.capacity_tokens < offload.capacity_tokens / 1.5
    assert plain.linear_s_per_token * 8 / 6 == pytest.approx(recompute.linear_s_per_token)
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


def test_this_machine() -> None:
    """The CPU's speed and free memory are measured, and plausible."""
    assert 1e8 < cpu_device(shape(), torch.float32).flops < 1e14
    assert 2**20 < free_memory_bytes(torch.device("cpu"), 2) < 2**45


DRIVER_NAMES = {
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100-PCIE-40GB": "A100 PCIe",
    "NVIDIA A100 80GB PCIe": "A100 PCIe",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA H200": "H200",
    "NVIDIA H20": "H20",
    "NVIDIA GH200 480GB": "GH200",
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "GB200",
    "NVIDIA L4": "L4",
    "NVIDIA L40": "L40",
    "NVIDIA L40S": "L40S",
    "NVIDIA A10": "A10",
    "NVIDIA A10G": "A10G",
    "NVIDIA RTX A6000": "RTX A6000",
    "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "Tesla V100-SXM2-32GB": "V100",
    "Tesla T4": "T4",
    "AMD Instinct MI300X": "MI300X",
    "NVIDIA RTX A1000": None,
    "NVIDIA A16": None,
    "NVIDIA RTX 4000 Ada Generation": None,
    "Quadro RTX 6000": None,
}


@pytest.mark.parametrize("name", DRIVER_NAMES)
def test_a_device_is_found_by_whole_words(name: str) -> None:
    """A name that begins like another one is another device; one that the table lacks is not taken for one it has."""
    found = known_device(name)
    assert (found and found.name) == DRIVER_NAMES[name]
