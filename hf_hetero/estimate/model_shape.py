"""This module reads from a model what decides its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A `ModelShape` is what of a model decides its cost.

    Args:
        num_layers, hidden, heads, kv_heads, head_dim, intermediate, vocab: of the config.
        num_params: all weights; a mixture of experts counts those that a token uses in `active_params`.
        trainable_params: weights that get a gradient.
        param_bytes: of all weights.
        element_bytes: of an activation.
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

    @property
    def has_adapters(self) -> bool:
        """Return whether what is trained stands beside the model's weights, as with LoRA, or is little of them."""
        return self.trainable_params < self.num_params / 2

    @property
    def head_params(self) -> int:
        """Count the weights of the head."""
        return self.vocab * self.hidden

    @property
    def outside_params(self) -> int:
        """Count the weights that stand outside the layers: embeddings and head, once if they are the same."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        layers = self.num_layers * (attention + 3 * self.hidden * self.intermediate)
        whole = self.num_params - (self.trainable_params if self.has_adapters else 0)
        # what layers do not explain is outside of them; at most embeddings and head, for experts are weights of layers
        return min(max(whole - layers, 0), 2 * self.head_params)

    @property
    def looked_up_params(self) -> int:
        """Count the weights that no product is made with: embeddings that are not the head, too."""
        return max(self.outside_params - self.head_params, 0)


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
        # an expert is a gated MLP of three matrices, and a router's weights are too few to matter
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
        active_params=max(active, 1),  # a config that miscounts its experts must not make work free, or negative
        trainable_params=sum(p.numel() for p in params if p.requires_grad),
        param_bytes=sum(p.numel() * p.element_size() for p in params),
        element_bytes=element_bytes,
        checkpointing=checkpointing,
        keeps_exchanged=keeps_exchanged,
        chunked_loss=chunked_loss,
        chunked_mlp=chunked_mlp,
    )
