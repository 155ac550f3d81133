"""This module estimates a cost model: floating-point operations and bytes of the model, speed of the device.

It only has to rank plans, so what matters is the ratio of quadratic to linear work and of compute to exchange, and that
the memory of a token is not too small. Everything assumed is written into the cost model's `source`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from hf_hetero.costs import ActivationPolicy, CostModel
from hf_hetero.estimate.devices import Device
from hf_hetero.estimate.memory import Shards, boundary_bytes, memory_of, state_bytes
from hf_hetero.estimate.model_shape import ModelShape
from hf_hetero.estimate.operations import (
    attention_flops,
    exchange_bytes,
    kv_bytes,
    linear_flops,
    optimizer_bytes,
    query_bytes,
    traffic_bytes,
)
from hf_hetero.topology import Topology

# Share of the time to gather sharded weights that does not hide behind computation. FlexSP's authors fitted a fixed
# cost of 0.63 s a micro-batch where moving its weights takes 1.1 s: 64 A100, 400 Gb/s a node. See the test.
EXPOSED_GATHER = 0.5
# What an all-gather brings a rank by the all-to-all of the table, where cards are switched (NVLink, Infinity Fabric):
# 347 to 368 GB/s on 8 H100 from 256 MiB on (hao-ai-lab/DistCA, commit 2afd2192, profiling data).
GATHER_GAIN, SWITCHED_BYTES_PER_S = 2.0, 40e9


def gather_s(shape: ModelShape, device: Device, topology: Topology, replicas: int = 1) -> float:
    """Return the seconds that sharding adds to a micro-batch: weights gathered twice, gradients scattered once.

    Those of a reference are gathered once more for each of its passes.

    A rank gathers from those of its replica. All ranks of a node share what the network brings, if they must have it.
    Part of it hides behind computation (`EXPOSED_GATHER`).
    """
    weight_bytes, num_shards = shape.num_params * shape.element_bytes, topology.num_ranks // replicas
    speed = _collective_bytes_per_s(device)
    # a replica is contiguous ranks: where it divides a node's, it does not straddle two nodes
    if topology.crosses_nodes(topology.num_ranks) and (topology.ranks_per_node or 0) % num_shards:
        assert topology.ranks_per_node is not None
        speed = min(speed, device.network_bytes_per_s * topology.ranks_per_node)
    return EXPOSED_GATHER * (3 + shape.reference_passes) * weight_bytes * (1 - 1 / num_shards) / speed


def replicas_s(shape: ModelShape, device: Device, topology: Topology, replicas: int) -> float:
    """Return the seconds in which replicas add up their gradients: each rank those of the part that it holds.

    A ring of each part's ranks sends every byte of it twice. The rings that pass a node share its network: as many as
    there are parts, or ranks of the node. As much hides behind computation as of what is gathered, which is assumed.
    """
    num_shards = topology.num_ranks // replicas
    part_bytes = shape.trainable_params * shape.element_bytes / num_shards
    speed = _collective_bytes_per_s(device)
    if topology.crosses_nodes(topology.num_ranks):
        assert topology.ranks_per_node is not None
        rings = min(num_shards, topology.ranks_per_node)
        speed = min(speed, device.network_bytes_per_s * topology.ranks_per_node / rings)
    return EXPOSED_GATHER * 2 * part_bytes * (1 - 1 / replicas) / speed


def _collective_bytes_per_s(device: Device) -> float:
    """Return what a collective along a ring brings a rank inside a node."""
    return device.link_bytes_per_s * (GATHER_GAIN if device.link_bytes_per_s > SWITCHED_BYTES_PER_S else 1.0)


def exchange_bytes_per_s(shape: ModelShape, device: Device, topology: Topology, degree: int) -> float:
    """Return what one rank sends a second in an all-to-all of this degree, by `exchange_bytes`.

    Across nodes only the share that leaves the node, 1 - ranks_per_node / degree, waits for the network. With more
    ranks than key-value heads a head goes to several of them, which are more bytes than `exchange_bytes` counts.
    """
    speed = device.link_bytes_per_s
    if topology.crosses_nodes(degree):
        assert topology.ranks_per_node is not None
        speed = min(speed, device.network_bytes_per_s / (1 - topology.ranks_per_node / degree))
    return speed * (shape.heads + shape.kv_heads) / (shape.heads + max(shape.kv_heads, min(degree, shape.heads)))


def estimate_cost_model(
    shape: ModelShape,
    device: Device,
    topology: Topology,
    degrees: tuple[int, ...],
    shards: Shards | None = None,
    policies: Collection[str] = (),
) -> CostModel:
    """Return a cost model from operations, bytes and speeds. `topology.memory_bytes` must be known.

    Args:
        shape, device, topology: what is estimated.
        degrees: to offer; 1 always is.
        shards: how model states are sharded over ranks; None: each rank holds them all. What replicas add up once a
            step, as the optimizer, is the same for every plan, and not in the cost model.
        policies: what groups may do to hold more tokens, of `plan.ACTIVATIONS`.
    """
    assert topology.memory_bytes is not None
    shape = shape if shards is None else replace(shape, autocasts=False)  # gathered in 16 bits, norms as well
    asked = shape.reference_passes
    exchanges = (4 + 2 * asked) * shape.num_layers  # two all-to-alls forward, two backward; two for a reference
    bandwidth = {d: exchange_bytes_per_s(shape, device, topology, d) for d in degrees if d > 1}
    states = state_bytes(shape, topology.num_ranks, shards)
    # backward begins as much twice as forward does
    micro_batch_s = device.layer_s * shape.num_layers * (1 + asked / 3)
    if shards is not None:
        micro_batch_s += gather_s(shape, device, topology, shards.replicas)
        if not shards.reduces_once:
            micro_batch_s += replicas_s(shape, device, topology, shards.replicas)
    token_bytes, fixed_bytes = memory_of(shape, states, topology.memory_bytes)
    return CostModel(
        name="estimate",
        provenance="estimated",
        source=(
            f"estimated, not measured: {shape.active_params / 1e6:.1f}M active weights, "
            f"{shape.trainable_params / 1e6:.1f}M trainable, checkpointing {'on' if shape.checkpointing else 'off'}"
            f"{', beside a reference' if asked else ''}{_replicas(shards)}; "
            f"{device.name} at {device.flops / 1e12:.3g} TFLOP/s in products, "
            f"{(device.attention_flops or device.flops) / 1e12:.3g} in attention, "
            f"{device.link_bytes_per_s / 1e9:.3g} GB/s in a node, {device.network_bytes_per_s / 1e9:.3g} GB/s across; "
            f"{token_bytes / 2**20:.3g} MiB a token, {topology.memory_bytes / 2**30:.3g} GiB a rank"
        ),
        ranks_per_node=topology.ranks_per_node,
        kv_bytes_per_token=kv_bytes(shape),
        num_kv_heads=shape.kv_heads,
        network_bytes_per_s=device.network_bytes_per_s if topology.crosses_nodes(topology.num_ranks) else None,
        ring_overlap=device.ring_overlap,
        query_bytes_per_token=query_bytes(shape),
        attention_s_per_token2=attention_s(shape, device),
        linear_s_per_token=linear_s(shape, device),
        micro_batch_s=micro_batch_s,
        all_to_all_bytes_per_token=exchange_bytes(shape),
        all_to_all_bytes_per_s=bandwidth,
        all_to_all_latency_s=dict.fromkeys(bandwidth, exchanges * device.latency_s),
        activation_bytes_per_token=token_bytes,
        model_state_bytes_per_rank=fixed_bytes,
        memory_bytes_per_rank=topology.memory_bytes,
        activation_policies=_policies(shape, device, states, topology.memory_bytes, policies),
        host_memory_bytes_per_rank=topology.host_memory_bytes,
    )


def _replicas(shards: Shards | None) -> str:
    """Say how many replicas there are, where there are several."""
    return "" if shards is None or shards.replicas == 1 else f", in {shards.replicas} replicas"


def attention_s(shape: ModelShape, device: Device) -> float:
    """Return the seconds of attention a squared token."""
    return attention_flops(shape) / (device.attention_flops or device.flops)


def linear_s(shape: ModelShape, device: Device) -> float:
    """Return the seconds of a token: products, what passes through memory, and what attention takes for each token."""
    seconds = linear_flops(shape) / device.flops + attention_s(shape, device) * device.attention_tokens
    if device.card_bytes_per_s is None:
        return seconds
    return seconds + traffic_bytes(shape) / device.card_bytes_per_s


def optimizer_s(shape: ModelShape, device: Device, num_shards: int) -> float:
    """Return the seconds of a step's optimizer, the same for every plan; it is not in the cost model."""
    return optimizer_bytes(shape, num_shards) / (device.card_bytes_per_s or math.inf)


def _policies(
    shape: ModelShape, device: Device, state_bytes: float, memory_bytes: float, policies: Collection[str]
) -> dict[str, ActivationPolicy]:
    """Return what groups cost that recompute layers, or also offload what that needs.

    Copies to the host and back hide behind what is computed with a token alone; attention would hide more of them.
    """
    _, fixed_bytes = memory_of(shape, state_bytes, memory_bytes)
    offered: dict[str, ActivationPolicy] = {}
    for name in policies:
        changed = replace(shape, checkpointing=True, offloads=name == "offload")
        token_bytes, changed_fixed_bytes = memory_of(changed, state_bytes, memory_bytes)
        tokens = (memory_bytes - changed_fixed_bytes) / token_bytes
        seconds, host_bytes = linear_s(changed, device), 0.0
        if changed.offloads:
            host_bytes = shape.num_layers * boundary_bytes(changed)
            seconds = max(seconds, 2 * host_bytes / device.host_bytes_per_s)
        if tokens >= 1:  # a policy under which not a single token fits is not offered
            offered[name] = ActivationPolicy(
                # chunks of MLPs are whole whatever the tokens; spread over the tokens they leave room for
                activation_bytes_per_token=(memory_bytes - fixed_bytes) / tokens,
                attention_s_per_token2=attention_s(changed, device),
                linear_s_per_token=seconds,
                exchanges=exchange_bytes(changed) / exchange_bytes(shape),
                host_bytes_per_token=host_bytes,
            )
    return offered
