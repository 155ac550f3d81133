"""This module estimates a cost model: floating-point operations and bytes of the model, speed of the device.

It only has to rank plans, so what matters is the ratio of quadratic to linear work and of compute to exchange, and that
the memory of a token is not too small. Everything assumed is written into the cost model's `source`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from hf_hetero.costs import ActivationPolicy, CostModel
from hf_hetero.estimate.memory import Shards, boundary_bytes, memory_of, model_state_bytes, sharded_bytes
from hf_hetero.estimate.model_shape import ModelShape
from hf_hetero.topology import Topology


@dataclass(frozen=True, slots=True)
class Device:
    """`Device` is the speed of one rank's device.

    Args:
        flops: dense operations a second in the training type.
        link_bytes_per_s: what one rank sends in an all-to-all inside a node.
        network_bytes_per_s: what one rank's part of its node's network carries when all ranks send.
        latency_s: fixed time of one exchange.
        layer_s: fixed time of a layer's forward and backward pass, whatever it holds.
        host_bytes_per_s: what one rank copies to or from its host.
        ring_overlap: share of a ring's attention behind which its exchange hides.
    """

    name: str
    flops: float
    link_bytes_per_s: float
    network_bytes_per_s: float = 6e9
    latency_s: float = 3e-5
    layer_s: float = 2e-4
    host_bytes_per_s: float = 12e9  # one way to page-locked memory: half of PCIe 4.0 x16, for ranks share a switch
    ring_overlap: float = 0.5  # assumed: half of the time a kernel leaves the links free, or the copies slow it down


# Peak dense bf16 (fp16 for V100 and T4) operations a second, from the data sheet or architecture paper of each product
# (NVIDIA's and, for MI300X, AMD's); where one gives only the figure with sparsity, half of that.
# Links: a fifth of the two-way figure of NVLink or Infinity Fabric, which is what FlexSP measured on A100 (600 GB/s ->
# 100-120 GB/s, arXiv:2412.01523, released solver); 12 GB/s where there is only PCIe, or a bridge between two cards.
KNOWN_DEVICES = (
    Device("GB200", 2500e12, 360e9),
    Device("B200", 2250e12, 360e9),
    Device("GH200", 989e12, 180e9),
    Device("H200", 989e12, 180e9),
    Device("H100 PCIe", 756e12, 12e9),
    Device("H100 NVL", 835e12, 12e9),
    Device("H100", 989e12, 180e9),
    Device("H800", 989e12, 80e9),
    Device("H20", 148e12, 180e9),
    Device("A100 PCIe", 312e12, 12e9),
    Device("A100", 312e12, 110e9),
    Device("A800", 312e12, 80e9),
    Device("A40", 149.7e12, 12e9),
    Device("A30", 165e12, 12e9),
    Device("A10G", 70e12, 12e9),
    Device("A10", 125e12, 12e9),
    Device("L40S", 362e12, 12e9),
    Device("L40", 181e12, 12e9),
    Device("L4", 121e12, 12e9),
    Device("RTX 6000 Ada", 364e12, 12e9),
    Device("RTX A6000", 154.8e12, 12e9),
    Device("RTX 4090", 165e12, 12e9),
    Device("RTX 3090", 71e12, 12e9),
    Device("V100", 125e12, 50e9),
    Device("T4", 65e12, 8e9),
    Device("MI300X", 1307e12, 180e9),
)
UTILISATION = 0.45  # share of the peak that training of dense models reaches in practice
ATTENTION_UTILISATION = 0.35  # flash kernels reach less of it, backward included
# Share of the time to gather sharded weights that does not hide behind computation. FlexSP's authors fitted a fixed
# cost of 0.63 s a micro-batch where moving its weights takes 1.1 s: 64 A100, 400 Gb/s a node. See the test.
EXPOSED_GATHER = 0.5


def linear_flops(shape: ModelShape) -> float:
    """Count a token's operations outside attention scores, forward and backward.

    2 a weight forward, 2 backward for activations, 2 for each trainable weight's gradient, 2 more for recompute.
    """
    recompute = 2 * shape.active_params if shape.checkpointing else 0
    trainable = min(shape.trainable_params, shape.active_params)
    return 4 * shape.active_params + 2 * trainable + recompute


def attention_flops(shape: ModelShape) -> float:
    """Count causal attention's operations a squared token: 2 H D a layer forward, 2.5 times as many backward."""
    # backward of a flash kernel computes the scores again: five matrix products where forward has two
    passes = 3.5 + (1 if shape.checkpointing else 0)
    return passes * 2 * shape.heads * shape.head_dim * shape.num_layers


def exchange_bytes(shape: ModelShape) -> float:
    """Count the bytes a token moves: queries, keys, values, outputs of all layers, in each pass that exchanges them."""
    passes = 3 if shape.checkpointing and not shape.keeps_exchanged else 2
    return passes * 2 * (shape.heads + shape.kv_heads) * shape.head_dim * shape.num_layers * shape.element_bytes


def kv_bytes(shape: ModelShape) -> float:
    """Count the bytes of a token's keys and values in all layers: what it costs to send them once."""
    return 2 * shape.kv_heads * shape.head_dim * shape.num_layers * shape.element_bytes


def gather_s(shape: ModelShape, device: Device, topology: Topology) -> float:
    """Return the seconds that sharding adds to a micro-batch: weights gathered twice, gradients scattered once.

    All ranks of a node share what the network brings. Part of it hides behind computation (`EXPOSED_GATHER`).
    """
    weight_bytes = shape.num_params * shape.element_bytes
    speed = device.link_bytes_per_s
    if topology.crosses_nodes(topology.num_ranks):
        assert topology.ranks_per_node is not None
        speed = min(speed, device.network_bytes_per_s * topology.ranks_per_node)
    return EXPOSED_GATHER * 3 * weight_bytes * (1 - 1 / topology.num_ranks) / speed


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


def known_device(name: str) -> Device | None:
    """Return the table's entry for a GPU by its driver's name, such as "NVIDIA A100-SXM4-80GB"; None if it has none.

    Every word of an entry is a word of the name; the entry with the most words is meant.
    """
    words = _words(name)
    return max((d for d in KNOWN_DEVICES if _words(d.name) <= words), key=lambda d: len(_words(d.name)), default=None)


def _words(name: str) -> set[str]:
    """Return the words and numbers of a name."""
    return set(re.findall("[a-z0-9]+", name.lower()))


def cuda_device(device: torch.device, dtype: torch.dtype) -> Device:
    """Return the table's entry for a GPU; an unknown one counts as an A100 without NVLink."""
    name = torch.cuda.get_device_name(device)
    entry = known_device(name) or Device(name, 312e12, 12e9)
    # fp32 products without tensor cores: the table's peak is that of bf16 on them, about 16 times as much on an A100
    slower = 16 if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else 1
    return Device(name, entry.flops * UTILISATION / slower, entry.link_bytes_per_s)


def cpu_device(shape: ModelShape, dtype: torch.dtype, timed_s: float = 0.2) -> Device:
    """Time matrix products of the model's own sizes, on all ranks at once, as training will run.

    The exchange is gloo over loopback: about 1 GB/s and 2 ms, assumed.
    """
    tokens, products = 512, 0
    own = torch.Generator().manual_seed(0)  # torch's decides the order of rows
    x = torch.randn(tokens, shape.hidden, generator=own).to(dtype)
    up = torch.randn(shape.hidden, shape.intermediate, generator=own).to(dtype)
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < timed_s:
        torch.nn.functional.silu(x @ up)
        products += 1
    flops = products * 2 * tokens * shape.hidden * shape.intermediate / elapsed
    return Device("CPU", flops, 1e9, 1e9, latency_s=2e-3, layer_s=2e-3, ring_overlap=0.0)


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
        shards: how model states are sharded over all ranks; None: each rank holds them all.
        policies: what groups may do to hold more tokens, of `plan.ACTIVATIONS`.
    """
    assert topology.memory_bytes is not None
    exchanges = 4 * shape.num_layers  # two all-to-alls forward, two backward
    bandwidth = {d: exchange_bytes_per_s(shape, device, topology, d) for d in degrees if d > 1}
    state_bytes, micro_batch_s = model_state_bytes(shape), device.layer_s * shape.num_layers
    if shards is not None:
        state_bytes = sharded_bytes(shape, topology.num_ranks, shards)
        micro_batch_s += gather_s(shape, device, topology)
    token_bytes, fixed_bytes = memory_of(shape, state_bytes, topology.memory_bytes)
    return CostModel(
        name="estimate",
        source=(
            f"estimated, not measured: {shape.active_params / 1e6:.1f}M active weights, "
            f"{shape.trainable_params / 1e6:.1f}M trainable, checkpointing {'on' if shape.checkpointing else 'off'}; "
            f"{device.name} at {device.flops / 1e12:.3g} TFLOP/s, {device.link_bytes_per_s / 1e9:.3g} GB/s in a node, "
            f"{device.network_bytes_per_s / 1e9:.3g} GB/s across; {token_bytes / 2**20:.3g} MiB a token, "
            f"{topology.memory_bytes / 2**30:.3g} GiB a rank"
        ),
        ranks_per_node=topology.ranks_per_node,
        kv_bytes_per_token=kv_bytes(shape),
        num_kv_heads=shape.kv_heads,
        network_bytes_per_s=device.network_bytes_per_s if topology.crosses_nodes(topology.num_ranks) else None,
        ring_overlap=device.ring_overlap,
        attention_s_per_token2=attention_s(shape, device),
        linear_s_per_token=linear_flops(shape) / device.flops,
        micro_batch_s=micro_batch_s,
        all_to_all_bytes_per_token=exchange_bytes(shape),
        all_to_all_bytes_per_s=bandwidth,
        all_to_all_latency_s=dict.fromkeys(bandwidth, exchanges * device.latency_s),
        activation_bytes_per_token=token_bytes,
        model_state_bytes_per_rank=fixed_bytes,
        memory_bytes_per_rank=topology.memory_bytes,
        activation_policies=_policies(shape, device, state_bytes, topology.memory_bytes, policies),
        host_memory_bytes_per_rank=topology.host_memory_bytes,
    )


def attention_s(shape: ModelShape, device: Device) -> float:
    """Return the seconds of attention a squared token."""
    return attention_flops(shape) / device.flops * (UTILISATION / ATTENTION_UTILISATION)


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
        linear_s, host_bytes = linear_flops(changed) / device.flops, 0.0
        if changed.offloads:
            host_bytes = shape.num_layers * boundary_bytes(changed)
            linear_s = max(linear_s, 2 * host_bytes / device.host_bytes_per_s)
        if tokens >= 1:  # a policy under which not a single token fits is not offered
            offered[name] = ActivationPolicy(
                # chunks of MLPs are whole whatever the tokens; spread over the tokens they leave room for
                activation_bytes_per_token=(memory_bytes - fixed_bytes) / tokens,
                attention_s_per_token2=attention_s(changed, device),
                linear_s_per_token=linear_s,
                exchanges=exchange_bytes(changed) / exchange_bytes(shape),
                host_bytes_per_token=host_bytes,
            )
    return offered
