"""This module counts the bytes that a rank needs for a model and its tokens, and those that it has."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import psutil
import torch

from hf_hetero.estimate.model_shape import ModelShape
from hf_hetero.model import chunked_mlp
from hf_hetero.model.chunked_loss import CHUNK_BYTES
from hf_hetero.topology import Topology

LEVERS: dict[str, dict[str, bool]] = {
    "everything kept": {},
    "chunked loss": {"chunked_loss": True},
    "layers recomputed": {"checkpointing": True},
    "MLPs in chunks": {"chunked_mlp": True},
    "offloaded": {"offloads": True},
}
"""Ways to hold more tokens, each added to those before it, and what it changes in a `ModelShape`."""
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables that torch's allocator reads: the name of now, and the one before torch 2.9."""
FP32_BYTES = 4
COMMUNICATOR_BYTES = 0.5e9  # of NCCL, on A100: 0.5 to 0.7 GB were reported (NVIDIA/nccl issues 864 and 964)


def activation_bytes(shape: ModelShape) -> float:
    """Count the bytes of a token when most of them are there: what waits for backward, and what computes just then.

    That is a layer in backward, or the loss before it, whichever holds more.
    """
    return waiting_bytes(shape) + max(working_bytes(shape), logits_bytes(shape))


def waiting_bytes(shape: ModelShape) -> float:
    """Count the bytes of a token that wait for backward.

    Each layer keeps what Korthikanti et al. (arXiv:2205.05198) count, without scores; with recompute, its input, and
    what it exchanged if that is kept. What is offloaded is there for two layers at a time: one that computes, and one
    whose copies are on their way.
    """
    if not shape.checkpointing:
        return shape.num_layers * layer_bytes(shape)
    return (min(2, shape.num_layers) if shape.offloads else shape.num_layers) * boundary_bytes(shape)


def layer_bytes(shape: ModelShape) -> float:
    """Count what a layer saves of a token; of its MLP only input and output if that goes in chunks.

    Under autocast each norm keeps its input and its result in fp32, and each of the five products that read a norm
    keeps a 16-bit copy of its own; norms of queries and keys keep their input in fp32 and their result.
    """
    if shape.autocasts:
        heads = (shape.heads + shape.kv_heads) * shape.head_dim
        kept_by_norms = (
            2 * 2 * FP32_BYTES * shape.hidden + (FP32_BYTES + shape.element_bytes) * heads * shape.norms_heads
        )
        inputs = (5 * shape.hidden + 2 * heads) * shape.element_bytes
        return kept_by_norms + inputs + (0 if _in_chunks(shape) else 4 * shape.intermediate * shape.element_bytes)
    kept_by_norms = 4 * shape.hidden * 2  # two norms, input and fp32 copy
    kept_by_attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim + shape.hidden
    kept_by_mlp = (0 if _in_chunks(shape) else 4 * shape.intermediate) + shape.hidden
    return (kept_by_norms + kept_by_attention + kept_by_mlp) * shape.element_bytes


def working_bytes(shape: ModelShape) -> float:
    """Count what a layer in backward holds of a token.

    That is the gradients of its MLP's three inner tensors and of two hidden states, and with recompute all that the
    layer saves.
    """
    gradients = 0 if _in_chunks(shape) else 3 * shape.intermediate * shape.element_bytes
    return gradients + 2 * shape.hidden * _stream_bytes(shape) + (layer_bytes(shape) if shape.checkpointing else 0)


def logits_bytes(shape: ModelShape) -> float:
    """Count what the loss holds of a token.

    Of whole logits the log-softmax, its gradient and that of the logits are there in backward, in fp32. A chunked loss
    keeps the head's input and its gradient instead.
    """
    if shape.chunked_loss:
        # autocast's last norm keeps its input and result in fp32; offloading puts three of these four tensors away
        stays = 2 if not shape.autocasts else 1 if shape.offloads else 4
        copy = shape.hidden * shape.element_bytes if shape.autocasts else 0
        return stays * shape.hidden * _stream_bytes(shape) + copy
    norm = (2 * FP32_BYTES + shape.element_bytes) * shape.hidden if shape.autocasts else 0
    return 3 * max(4, shape.element_bytes) * shape.vocab + norm


def _in_chunks(shape: ModelShape) -> bool:
    """Return whether MLPs go in chunks: where layers are recomputed."""
    return shape.checkpointing and shape.chunked_mlp


def boundary_bytes(shape: ModelShape) -> float:
    """Count what a layer that is recomputed keeps of a token: its input, and what it exchanged if that is kept."""
    exchanged = 2 * (shape.heads + shape.kv_heads) * shape.head_dim if shape.keeps_exchanged else 0
    return shape.hidden * _stream_bytes(shape) + exchanged * shape.element_bytes


def _stream_bytes(shape: ModelShape) -> int:
    """Return the bytes of a number of the hidden states that layers hand on."""
    return FP32_BYTES if shape.autocasts else shape.element_bytes


def cast_bytes(shape: ModelShape, num_layers: int) -> float:
    """Count the 16-bit copies that autocast makes of some layers' weights; 0 without autocast."""
    if not shape.autocasts:
        return 0.0
    return (shape.num_params - shape.outside_params) / shape.num_layers * num_layers * shape.element_bytes


def mlp_bytes(shape: ModelShape) -> float:
    """Count the bytes of an MLP in chunks whatever the tokens: a chunk's inner tensors twice, fp32 gradients once."""
    if not _in_chunks(shape):
        return 0.0
    # of the three weights of a gated MLP, added up over its chunks; frozen ones, as under LoRA, have none
    gradients = 0 if shape.has_adapters else 4 * 3 * shape.hidden * shape.intermediate
    return 2 * chunked_mlp.CHUNK_BYTES + gradients


def loss_bytes(shape: ModelShape) -> float:
    """Count the bytes of a chunked loss whatever the tokens: a full chunk's logits, and the head's gradient in fp32."""
    if not shape.chunked_loss:
        return 0.0
    chunk = tokens_in_chunk(shape) * chunked_logits_bytes(shape)
    return chunk + (0 if shape.has_adapters else 4 * shape.head_params)


def tokens_in_chunk(shape: ModelShape) -> float:
    """Return the most tokens whose logits a chunked loss holds at once."""
    return CHUNK_BYTES / (4 * shape.vocab)


def chunked_logits_bytes(shape: ModelShape) -> float:
    """Count the bytes of a token's logits in a chunk: in fp32 once, or twice under autocast; and twice in 16 bits."""
    return shape.vocab * (FP32_BYTES * (1 + shape.autocasts) + 2 * shape.element_bytes)


def memory_of(shape: ModelShape, state_bytes: float, memory_bytes: float) -> tuple[float, float]:
    """Count the bytes of a token, and those whatever the tokens, of a rank that holds the model's states.

    Of the two moments that hold most (`moments`), it is the one in which the memory ends first.
    """
    found = moments(shape, state_bytes, memory_bytes)
    return min(found, key=lambda moment: (memory_bytes - moment[1]) / moment[0])


def peak_bytes(shape: ModelShape, state_bytes: float, tokens: int) -> float:
    """Count the bytes of a rank that holds the model's states when most of them are there, in a micro-batch."""
    return max(fixed + tokens * token for token, fixed in moments(shape, state_bytes, math.inf))


def moments(shape: ModelShape, state_bytes: float, memory_bytes: float) -> tuple[tuple[float, float], ...]:
    """Count the bytes of a token, and those whatever the tokens: when a layer is in backward; when the loss is made.

    Where memory ends before a chunk of the loss is full, only the logits of the tokens that fit are ever there, so they
    are counted with each token; an MLP that never fills a chunk is as if it had none.
    """
    waiting = waiting_bytes(shape)
    # autocast holds copies of trained weights until forward ends; then only layers that keep everything hold theirs on
    held = 1 if shape.checkpointing else shape.num_layers
    cast = held if shape.has_adapters else shape.num_layers
    head = shape.head_params * shape.element_bytes if shape.autocasts else 0
    token, fixed = (
        waiting + logits_bytes(shape),
        state_bytes + loss_bytes(shape) + head + cast_bytes(shape, cast),
    )
    if shape.chunked_loss and fixed + token * tokens_in_chunk(shape) > memory_bytes:
        fixed -= tokens_in_chunk(shape) * chunked_logits_bytes(shape)
        token += chunked_logits_bytes(shape)
    if _in_chunks(shape) and state_bytes + 2 * mlp_bytes(shape) > memory_bytes:
        shape = replace(shape, chunked_mlp=False)
    return (
        (waiting + working_bytes(shape), state_bytes + mlp_bytes(shape) + cast_bytes(shape, held)),
        (token, fixed),
    )


def model_state_bytes(shape: ModelShape) -> float:
    """Count the bytes of weights, of gradients and two fp32 moments of Adam for the trainable ones; of a reference."""
    per_trainable = shape.param_bytes / shape.num_params + 8
    return shape.param_bytes + shape.trainable_params * per_trainable + shape.reference_bytes


@dataclass(frozen=True, slots=True)
class Shards:
    """`Shards` are model states in parts over ranks (FSDP, HSDP, ZeRO-3), layers gathered while they compute.

    Args:
        offloaded: the parts wait in the host's memory, so only what is gathered takes the device's.
        whole_gradients: gradients add up whole over the micro-batches of a step, and are scattered by the last one.
        replicas: groups of ranks that hold all states each; 1: all ranks together hold them once.
        reduces_once: replicas add up their gradients once a step; else in every micro-batch.
    """

    offloaded: bool = False
    whole_gradients: bool = False
    replicas: int = 1
    reduces_once: bool = False


def state_bytes(shape: ModelShape, num_ranks: int, shards: Shards | None) -> float:
    """Count the bytes of the model's states on a rank's device; without shards each rank holds them all."""
    return model_state_bytes(shape) if shards is None else sharded_bytes(shape, num_ranks, shards)


def sharded_bytes(shape: ModelShape, num_ranks: int, shards: Shards) -> float:
    """Count the bytes of the model's states on a rank's device."""
    own = 0.0 if shards.offloaded else model_state_bytes(shape) * shards.replicas / num_ranks
    gradients = shape.trainable_params * shape.element_bytes if shards.whole_gradients else 0.0
    return own + gathered_bytes(shape) + gradients


def gathered_bytes(shape: ModelShape) -> float:
    """Count what a rank of fully sharded training holds beside its shard: layers that are whole while they compute.

    Two layers' weights, because the next one is gathered early, and once what stands outside the layers, embeddings and
    head; as much again of gradients, for one layer, where these weights are trained.
    """
    outside = shape.outside_params
    layer = (shape.num_params - outside) / shape.num_layers
    gradients = 0 if shape.has_adapters else layer + outside
    return (2 * layer + outside + gradients) * shape.element_bytes


def free_memory_bytes(device: torch.device, ranks_on_node: int, num_ranks: int = 1) -> int:
    """Return what one rank may use: of the GPU's memory, or its part of what the host gives without swapping.

    See `usable_bytes` for a GPU.
    """
    if device.type == "cuda":
        return int(usable_bytes(torch.cuda.get_device_properties(device).total_memory, num_ranks))
    return int(0.9 * psutil.virtual_memory().available / max(ranks_on_node, 1))


def num_communicators(num_ranks: int) -> int:
    """Count the communicators of a run: one for groups of each degree above 1, torch's own, and that of gradients."""
    return len(Topology(num_ranks).degrees) + 1 if num_ranks > 1 else 0


def usable_bytes(card_bytes: float, num_ranks: int) -> float:
    """Return what CUDA's context, the allocator's losses and communicators leave of a card; half of it at least."""
    return max(0.5 * card_bytes, 0.95 * card_bytes - num_communicators(num_ranks) * COMMUNICATOR_BYTES)


def allocator_advice(device: torch.device) -> str:
    """Say how torch's allocator loses less of a GPU between tensors; nothing where it was told, or on a CPU."""
    told = any("expandable_segments" in os.environ.get(name, "") for name in ALLOCATOR_SETTINGS)
    if device.type != "cuda" or told:
        return ""
    return f"Set {ALLOCATOR_SETTINGS[0]}=expandable_segments:True before the start: less memory lies between tensors."


def host_memory_bytes(device: torch.device, ranks_on_node: int) -> int | None:
    """Return what one rank's GPU may put into the host's memory: its part of half of what is free; None on a CPU."""
    return int(0.5 * psutil.virtual_memory().available / max(ranks_on_node, 1)) if device.type == "cuda" else None


def tokens_by_lever(shape: ModelShape, num_ranks: int, card_bytes: float) -> dict[str, int]:
    """Count the tokens that a rank holds as one lever after the other is pulled; 0 where the model does not fit.

    Weights are sharded over the ranks; what ranks exchange is kept for the recompute.

    Args:
        shape: of the model; how it saves memory is set here.
        num_ranks: of the run.
        card_bytes: memory of a card.
    """
    memory_bytes = usable_bytes(card_bytes, num_ranks)
    tokens: dict[str, int] = {}
    shape = replace(shape, checkpointing=False, keeps_exchanged=True, chunked_loss=False, chunked_mlp=False)
    shape = replace(shape, autocasts=False)  # shards are gathered in 16 bits
    for lever, change in LEVERS.items():
        shape = replace(shape, **change)
        token_bytes, fixed_bytes = memory_of(shape, sharded_bytes(shape, num_ranks, Shards()), memory_bytes)
        tokens[lever] = max(0, int((memory_bytes - fixed_bytes) / token_bytes))
    return tokens
