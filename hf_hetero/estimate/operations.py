"""This module counts what a token costs in training: operations, bytes through the card's memory, bytes exchanged."""

from __future__ import annotations

from hf_hetero.estimate.model_shape import ModelShape

UNFUSED = 4.0
"""How often tensors between products pass through memory, by how often they would if each layer's were read and
written once. Fitted (`shares`) to runs that were compiled; what transformers' own operations move in a Llama layer in
16 bits, which has its norms and rotary embeddings in several steps, is within 5 % of it."""
HEAD_NORM_BYTES, CAST_HEAD_NORM_BYTES = 132, 36
"""What a norm of heads moves of each element of queries and keys, forward and backward, in steps of their own in fp32;
and what it moves more under autocast. Counted, as are the next."""
CAST_HIDDEN_BYTES, CAST_HEAD_BYTES = 92, 44
"""What autocast moves more of each element of hidden states, which stay in fp32, with 16-bit copies for products; and
of queries and keys, whose rotary embeddings are in fp32."""
LOGIT_BYTES = 40
"""Read and written for a logit: fp32 copy, softmax, its gradient, back in the training type; counted, not fitted."""
ADAPTER_OUTPUTS = 4
"""How often the output of an adapter passes through memory: made, scaled, added to that of the layer's own product."""


def linear_flops(shape: ModelShape) -> float:
    """Count a token's operations outside attention scores, forward and backward, and forward through a reference.

    2 a weight forward, 2 backward for activations, 2 for each trainable weight's gradient, 2 more for the recompute of
    layers. Embeddings are looked up: they count only as the head that they may be.
    """
    worked = max(shape.active_params - shape.looked_up_params, 0)
    recomputed = max(worked - shape.head_params, 0) if shape.checkpointing else 0
    trained = shape.trainable_params - (0 if shape.has_adapters else shape.looked_up_params)
    asked = 2 * shape.reference_passes * worked
    return 4 * worked + 2 * recomputed + 2 * min(max(trained, 0), worked) + asked


def attention_flops(shape: ModelShape) -> float:
    """Count causal attention's operations a squared token: 2 H D a layer forward, 2.5 times as many backward."""
    # backward of a flash kernel computes the scores again: five matrix products where forward has two
    passes = 3.5 + (1 if shape.checkpointing else 0) + shape.reference_passes
    return passes * 2 * shape.heads * shape.head_dim * shape.num_layers


def traffic_bytes(shape: ModelShape) -> float:
    """Count the bytes that a token moves through the card's memory between products, forward and backward.

    In a pass of a layer, hidden states are read or written six times by two norms and two sums, queries, keys, values
    and outputs twice, inner tensors of the MLP three times; `UNFUSED` times that. Backward counts as two passes.
    Adapters (LoRA on all linear layers) read each product's input and touch its output. What is not compiled moves more
    for norms of heads, and under autocast.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    elements = UNFUSED * (6 * shape.hidden + 2 * (queries + 2 * keys) + 3 * shape.intermediate)
    if shape.has_adapters:
        inputs = 5 * shape.hidden + queries + shape.intermediate
        outputs = queries + 2 * keys + 2 * shape.hidden + 2 * shape.intermediate
        elements += inputs + ADAPTER_OUTPUTS * outputs
    passes = (4 if shape.checkpointing else 3) + shape.reference_passes
    layer = elements * shape.element_bytes + _in_steps_bytes(shape) / 3
    return passes * shape.num_layers * layer + LOGIT_BYTES * shape.vocab


def _in_steps_bytes(shape: ModelShape) -> int:
    """Count what a layer moves more in its three passes because its operations are steps of their own."""
    if shape.compiled:
        return 0
    heads = (shape.heads + shape.kv_heads) * shape.head_dim
    norms = (HEAD_NORM_BYTES + CAST_HEAD_NORM_BYTES * shape.autocasts) * heads * shape.norms_heads
    return norms + (CAST_HIDDEN_BYTES * shape.hidden + CAST_HEAD_BYTES * heads) * shape.autocasts


def optimizer_bytes(shape: ModelShape, num_shards: int) -> float:
    """Count the bytes that a step of Adam moves through a card's memory: 40 for a weight that it trains.

    Weight, gradient and two moments, in fp32: read, and all but the gradient written, plus what is between.
    """
    return 40 * shape.trainable_params / num_shards


def exchange_bytes(shape: ModelShape) -> float:
    """Count the bytes a token moves: queries, keys, values, outputs of all layers, in each pass that exchanges them."""
    passes = (3 if shape.checkpointing and not shape.keeps_exchanged else 2) + shape.reference_passes
    return passes * 2 * (shape.heads + shape.kv_heads) * shape.head_dim * shape.num_layers * shape.element_bytes


def kv_bytes(shape: ModelShape) -> float:
    """Count the bytes of a token's keys and values in all layers: what it costs to send them once."""
    return 2 * shape.kv_heads * shape.head_dim * shape.num_layers * shape.element_bytes


def query_bytes(shape: ModelShape) -> float:
    """Count the bytes of a token's queries in all layers, and 4 bytes for each head, such as its log-sum-exp takes.

    Outputs and gradients take as many.
    """
    return shape.heads * (shape.head_dim * shape.element_bytes + 4) * shape.num_layers
