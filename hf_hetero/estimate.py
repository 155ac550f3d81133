"""A first cost model without a measurement: floating-point operations and bytes of the model, speed of the device.

It only has to rank plans, so what matters is the ratio of quadratic to linear work and of compute to exchange, and that
the memory of a token is not too small. Everything assumed is written into the cost model's `source`.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from hf_hetero import chunked_mlp
from hf_hetero.activation_policy import ActivationPolicy
from hf_hetero.cost_model import CostModel
from hf_hetero.lm_head import CHUNK_BYTES
from hf_hetero.topology import Topology


@dataclass(frozen=True, slots=True)
class Device:
    """Speed of one rank's device.

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


# Peak dense bf16 (fp16 for V100 and T4) operations a second: NVIDIA's data sheets of each product.
# Links: a fifth of NVLink's two-way figure, which is what FlexSP measured on A100 (600 GB/s -> 100-120 GB/s,
# arXiv:2412.01523, released solver); 12 GB/s where there is only PCIe.
KNOWN_DEVICES = (
    Device("B200", 2250e12, 360e9),
    Device("H200", 989e12, 180e9),
    Device("H100 PCIe", 756e12, 12e9),
    Device("H100", 989e12, 180e9),
    Device("A100", 312e12, 110e9),
    Device("L40S", 362e12, 12e9),
    Device("L4", 121e12, 12e9),
    Device("A10", 125e12, 12e9),
    Device("RTX 4090", 165e12, 12e9),
    Device("RTX 3090", 71e12, 12e9),
    Device("V100", 125e12, 50e9),
    Device("T4", 65e12, 8e9),
)
UTILISATION = 0.45  # share of the peak that training of dense models reaches in practice
ATTENTION_UTILISATION = 0.35  # flash kernels reach less of it, backward included
COMMUNICATOR_BYTES = 0.5e9  # of NCCL, on A100: 0.5 to 0.7 GB were reported (NVIDIA/nccl issues 864 and 964)
# Share of the time to gather sharded weights that does not hide behind computation. FlexSP's authors fitted a fixed
# cost of 0.63 s a micro-batch where moving its weights takes 1.1 s: 64 A100, 400 Gb/s a node. See the test.
EXPOSED_GATHER = 0.5


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides its cost.

    Args:
        num_layers, hidden, heads, kv_heads, head_dim, intermediate, vocab: of the config.
        num_params: all weights; a mixture of experts counts those that a token uses in `active_params`.
        trainable_params: weights that get a gradient.
        window: None, or the mean number of tokens a token sees.
        element_bytes: of an activation.
        state_bytes_per_trainable: gradient, and optimizer state.
        checkpointing: whether layers are recomputed in backward.
        keeps_exchanged: whether a recompute finds what was exchanged, instead of exchanging it again.
        chunked_loss: whether the loss does without whole logits.
        chunked_mlp: whether recomputed MLPs do without whole inner tensors.
        offloads: whether what recompute needs waits in the host's memory.
    """

    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    num_params: int
    active_params: int
    trainable_params: int
    param_bytes: int
    element_bytes: int
    checkpointing: bool
    keeps_exchanged: bool = False
    chunked_loss: bool = False
    chunked_mlp: bool = False
    offloads: bool = False


def shape_of(
    model: torch.nn.Module,
    config: Any,
    element_bytes: int,
    checkpointing: bool,
    keeps_exchanged: bool = False,
    chunked_loss: bool = False,
    chunked_mlp: bool = False,
) -> ModelShape:
    """Read a model's shape from its config and its weights."""
    heads = config.num_attention_heads
    params = list(model.parameters())
    num_params = sum(p.numel() for p in params)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    intermediate = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
    intermediate = intermediate or 4 * config.hidden_size
    active = num_params
    if experts:
        used = getattr(config, "num_experts_per_tok", experts)
        active -= 3 * config.hidden_size * intermediate * config.num_hidden_layers * (experts - used)
        intermediate *= used
    return ModelShape(
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=intermediate,
        vocab=config.vocab_size,
        num_params=num_params,
        active_params=max(active, 1),
        trainable_params=sum(p.numel() for p in params if p.requires_grad),
        param_bytes=sum(p.numel() * p.element_size() for p in params),
        element_bytes=element_bytes,
        checkpointing=checkpointing,
        keeps_exchanged=keeps_exchanged,
        chunked_loss=chunked_loss,
        chunked_mlp=chunked_mlp,
    )


def linear_flops(shape: ModelShape) -> float:
    """Operations of a token outside attention scores, forward and backward.

    2 a weight forward, 2 backward for activations, 2 for each trainable weight's gradient, 2 more for recompute.
    """
    recompute = 2 * shape.active_params if shape.checkpointing else 0
    trainable = min(shape.trainable_params, shape.active_params)
    return 4 * shape.active_params + 2 * trainable + recompute


def attention_flops(shape: ModelShape) -> float:
    """Operations of causal attention scores, for each squared token: 2 H D a layer forward, 2.5 times that backward."""
    passes = 3.5 + (1 if shape.checkpointing else 0)
    return passes * 2 * shape.heads * shape.head_dim * shape.num_layers


def exchange_bytes(shape: ModelShape) -> float:
    """Bytes a token moves: queries, keys, values and outputs of every layer, forward, backward, maybe recomputed."""
    passes = 3 if shape.checkpointing and not shape.keeps_exchanged else 2
    return passes * 2 * (shape.heads + shape.kv_heads) * shape.head_dim * shape.num_layers * shape.element_bytes


def kv_bytes(shape: ModelShape) -> float:
    """Bytes of a token's keys and values in all layers: what it costs to send them once."""
    return 2 * shape.kv_heads * shape.head_dim * shape.num_layers * shape.element_bytes


def activation_bytes(shape: ModelShape) -> float:
    """Memory of a token: activations that wait for backward, and the logits.

    Each layer keeps what Korthikanti et al. (arXiv:2205.05198) count, without scores; with recompute, its input, what
    it exchanged if that is kept, and one layer in full, of whose MLP only input and output if it goes in chunks. What
    is offloaded is there for two layers at a time: one that computes, and one whose copies are on their way. Whole
    logits exist three times: once in the training type, twice in fp32; a chunked loss keeps the head's input and its
    gradient instead.
    """
    kept_by_norms = 4 * shape.hidden * 2  # two norms, input and fp32 copy
    kept_by_attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim + shape.hidden
    kept_by_mlp = (0 if shape.checkpointing and shape.chunked_mlp else 4 * shape.intermediate) + shape.hidden
    layer = (kept_by_norms + kept_by_attention + kept_by_mlp) * shape.element_bytes
    waiting = min(2, shape.num_layers) if shape.offloads else shape.num_layers
    layers = waiting * boundary_bytes(shape) + layer if shape.checkpointing else shape.num_layers * layer
    if shape.chunked_loss:
        return layers + 2 * shape.hidden * shape.element_bytes
    return layers + shape.vocab * (shape.element_bytes + 8)


def boundary_bytes(shape: ModelShape) -> float:
    """What a layer that is recomputed keeps of a token: its input, and what it exchanged if that is kept."""
    exchanged = 2 * (shape.heads + shape.kv_heads) * shape.head_dim if shape.keeps_exchanged else 0
    return (shape.hidden + exchanged) * shape.element_bytes


def mlp_bytes(shape: ModelShape) -> float:
    """Memory of an MLP in chunks whatever the tokens: a chunk's inner tensors twice, and its gradients in fp32."""
    if not (shape.checkpointing and shape.chunked_mlp):
        return 0.0
    gradients = 4 * 3 * shape.hidden * shape.intermediate if shape.trainable_params == shape.num_params else 0
    return 2 * chunked_mlp.CHUNK_BYTES + gradients


def loss_bytes(shape: ModelShape) -> float:
    """Memory of a chunked loss whatever the tokens: a full chunk's logits, and the head's gradient in fp32."""
    if not shape.chunked_loss:
        return 0.0
    chunk = tokens_in_chunk(shape) * chunked_logits_bytes(shape)
    return chunk + (4 * shape.vocab * shape.hidden if shape.trainable_params == shape.num_params else 0)


def tokens_in_chunk(shape: ModelShape) -> float:
    """Most tokens whose logits a chunked loss holds at once."""
    return CHUNK_BYTES / (4 * shape.vocab)


def chunked_logits_bytes(shape: ModelShape) -> float:
    """Logits of a token in a chunk: once in fp32, twice in the training type."""
    return shape.vocab * (4 + 2 * shape.element_bytes)


def memory_of(shape: ModelShape, state_bytes: float, memory_bytes: float) -> tuple[float, float]:
    """Bytes of a token, and bytes whatever the tokens, of a rank that holds the model's states.

    The loss and the MLPs take their chunks one after the other, so that the larger counts. Where memory ends before a
    chunk of the loss is full, only the logits of the tokens that fit are ever there, so they are counted with each
    token; an MLP that never fills a chunk is as if it had none.
    """
    if shape.checkpointing and shape.chunked_mlp and state_bytes + 2 * mlp_bytes(shape) > memory_bytes:
        shape = replace(shape, chunked_mlp=False)
    fixed, token = state_bytes + max(loss_bytes(shape), mlp_bytes(shape)), activation_bytes(shape)
    if shape.chunked_loss and fixed + token * tokens_in_chunk(shape) > memory_bytes:
        fixed -= tokens_in_chunk(shape) * chunked_logits_bytes(shape)
        token += chunked_logits_bytes(shape)
    return token, fixed


def model_state_bytes(shape: ModelShape) -> float:
    """Weights, their gradients, and two fp32 moments of Adam for the trainable ones."""
    per_trainable = shape.param_bytes / shape.num_params + 8
    return shape.param_bytes + shape.trainable_params * per_trainable


@dataclass(frozen=True, slots=True)
class Shards:
    """Model states in parts over all ranks (FSDP, ZeRO-3), layers gathered while they compute.

    Args:
        offloaded: the parts wait in the host's memory, so only what is gathered takes the device's.
        whole_gradients: gradients add up whole over the micro-batches of a step, and are scattered by the last one.
    """

    offloaded: bool = False
    whole_gradients: bool = False


def sharded_bytes(shape: ModelShape, num_ranks: int, shards: Shards) -> float:
    """What a rank's device holds of the model's states."""
    own = 0.0 if shards.offloaded else model_state_bytes(shape) / num_ranks
    gradients = shape.trainable_params * shape.element_bytes if shards.whole_gradients else 0.0
    return own + gathered_bytes(shape) + gradients


def gathered_bytes(shape: ModelShape) -> float:
    """What a rank of fully sharded training holds beside its shard: layers that are whole while they compute.

    Two layers' weights, because the next one is gathered early, one layer's gradients, and the same, once, of what
    stands outside the layers: embeddings and head.
    """
    attention = 2 * shape.hidden * (shape.heads + shape.kv_heads) * shape.head_dim
    layer = attention + 3 * shape.hidden * shape.intermediate
    outside = min(max(shape.num_params - shape.num_layers * layer, 0), 2 * shape.vocab * shape.hidden)
    return (3 * (shape.num_params - outside) / shape.num_layers + 2 * outside) * shape.element_bytes


def gather_s(shape: ModelShape, device: Device, topology: Topology) -> float:
    """Seconds that fully sharded training adds to a micro-batch: weights gathered twice, gradients scattered once.

    All ranks of a node share what the network brings. Part of it hides behind computation (`EXPOSED_GATHER`).
    """
    weight_bytes = shape.num_params * shape.element_bytes
    speed = device.link_bytes_per_s
    if topology.crosses_nodes(topology.num_ranks):
        assert topology.ranks_per_node is not None
        speed = min(speed, device.network_bytes_per_s * topology.ranks_per_node)
    return EXPOSED_GATHER * 3 * weight_bytes * (1 - 1 / topology.num_ranks) / speed


def exchange_bytes_per_s(shape: ModelShape, device: Device, topology: Topology, degree: int) -> float:
    """What one rank sends in an all-to-all of this degree, by `exchange_bytes`.

    Across nodes only the share that leaves the node, 1 - ranks_per_node / degree, waits for the network. With more
    ranks than key-value heads a head goes to several of them, which are more bytes than `exchange_bytes` counts.
    """
    speed = device.link_bytes_per_s
    if topology.crosses_nodes(degree):
        assert topology.ranks_per_node is not None
        speed = min(speed, device.network_bytes_per_s / (1 - topology.ranks_per_node / degree))
    return speed * (shape.heads + shape.kv_heads) / (shape.heads + max(shape.kv_heads, min(degree, shape.heads)))


def cuda_device(device: torch.device, dtype: torch.dtype) -> Device:
    """The table's entry for a GPU; an unknown one counts as an A100 without NVLink."""
    name = torch.cuda.get_device_name(device)
    found = next((known for known in KNOWN_DEVICES if known.name in name), Device(name, 312e12, 12e9))
    slower = 16 if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else 1
    return Device(name, found.flops * UTILISATION / slower, found.link_bytes_per_s)


def cpu_device(shape: ModelShape, dtype: torch.dtype, timed_s: float = 0.2) -> Device:
    """This machine's speed: matrix products of the model's own sizes, timed on all ranks at once, as training will run.

    The exchange is gloo over loopback: about 1 GB/s and 2 ms, assumed.
    """
    tokens, products = 512, 0
    x = torch.randn(tokens, shape.hidden).to(dtype)
    up = torch.randn(shape.hidden, shape.intermediate).to(dtype)
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < timed_s:
        torch.nn.functional.silu(x @ up)
        products += 1
    flops = products * 2 * tokens * shape.hidden * shape.intermediate / elapsed
    return Device("CPU", flops, 1e9, 1e9, latency_s=2e-3, layer_s=2e-3, ring_overlap=0.0)


def free_memory_bytes(device: torch.device, ranks_on_node: int, num_communicators: int = 0) -> int:
    """What one rank may use: of the GPU's memory, or its part of what the host gives without swapping.

    On a GPU, a twentieth is left to the CUDA context and the allocator, and each communicator takes its buffers.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return int(max(0.5 * total, 0.95 * total - num_communicators * COMMUNICATOR_BYTES))
    return int(0.9 * psutil.virtual_memory().available / max(ranks_on_node, 1))


def host_memory_bytes(device: torch.device, ranks_on_node: int) -> int | None:
    """What one rank may use of the host for what its GPU puts there: its part of half of what is free; else None."""
    return int(0.5 * psutil.virtual_memory().available / max(ranks_on_node, 1)) if device.type == "cuda" else None


def estimate_cost_model(
    shape: ModelShape,
    device: Device,
    topology: Topology,
    degrees: tuple[int, ...],
    shards: Shards | None = None,
    policies: Collection[str] = (),
) -> CostModel:
    """Cost model from operations, bytes and speeds. `topology.memory_bytes` must be known.

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
    """Seconds of a token squared."""
    return attention_flops(shape) / device.flops * (UTILISATION / ATTENTION_UTILISATION)


def _policies(
    shape: ModelShape, device: Device, state_bytes: float, memory_bytes: float, policies: Collection[str]
) -> dict[str, ActivationPolicy]:
    """What groups cost that recompute layers, or also offload what that needs.

    Copies to the host and back hide behind what is computed with a token alone; attention would hide more of them.
    """
    _, fixed_bytes = memory_of(shape, state_bytes, memory_bytes)
    found: dict[str, ActivationPolicy] = {}
    for name in policies:
        changed = replace(shape, checkpointing=True, offloads=name == "offload")
        token_bytes, changed_fixed_bytes = memory_of(changed, state_bytes, memory_bytes)
        tokens = (memory_bytes - changed_fixed_bytes) / token_bytes
        linear_s, host_bytes = linear_flops(changed) / device.flops, 0.0
        if changed.offloads:
            host_bytes = shape.num_layers * boundary_bytes(changed)
            linear_s = max(linear_s, 2 * host_bytes / device.host_bytes_per_s)
        if tokens >= 1:
            found[name] = ActivationPolicy(
                # chunks of MLPs are whole whatever the tokens; spread over the tokens they leave room for
                activation_bytes_per_token=(memory_bytes - fixed_bytes) / tokens,
                attention_s_per_token2=attention_s(changed, device),
                linear_s_per_token=linear_s,
                exchanges=exchange_bytes(changed) / exchange_bytes(shape),
                host_bytes_per_token=host_bytes,
            )
    return found
