"""This module reads from a model what decides its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_hetero.estimate.active import active_params, num_experts, num_used
from hf_hetero.model.by_layer import sizes_of


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
        reference_passes: of each token through a reference, forward only: its adapters off, or a frozen model.
        reference_bytes: weights of a frozen model that is the reference.
        autocasts: whether weights are in fp32 and products in 16 bits, so that hidden states and norms are in fp32.
        norms_heads: whether queries and keys have norms of their own.
        compiled: whether a compiler fuses what is between products.
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
    reference_passes: int = 0
    reference_bytes: int = 0
    autocasts: bool = False
    norms_heads: bool = False
    compiled: bool = False

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
    compiled: bool = False,
) -> ModelShape:
    """Read a model's shape from its config and its weights; what differs by layer is averaged over them."""
    params = list(model.parameters())
    heads = _mean(config, "num_attention_heads") or 1  # of layers with state alone: none is exchanged
    wide = _mean(config, "intermediate_size") or 4 * config.hidden_size
    intermediate = wide
    if num_experts(config):
        # those that a token is sent to, and those that all tokens are computed with
        each = _mean(config, "moe_intermediate_size") or wide
        shared = getattr(config, "n_shared_experts", None) or 0
        intermediate = each * ((num_used(config) or num_experts(config)) + shared)
    return ModelShape(
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=_mean(config, "num_key_value_heads") or heads,
        head_dim=_mean(config, "head_dim") or config.hidden_size // heads,
        intermediate=intermediate,
        vocab=config.vocab_size,
        num_params=sum(p.numel() for p in params),
        active_params=active_params(model, config),
        trainable_params=sum(p.numel() for p in params if p.requires_grad),
        param_bytes=sum(p.numel() * p.element_size() for p in params),
        element_bytes=element_bytes,
        checkpointing=checkpointing,
        keeps_exchanged=keeps_exchanged,
        chunked_loss=chunked_loss,
        chunked_mlp=chunked_mlp,
        autocasts=element_bytes == 2 and all(p.dtype == torch.float32 for p in params),
        norms_heads=any(name.rpartition(".")[2] == "q_norm" for name, _ in model.named_modules()),
        compiled=compiled,
    )


def _mean(config: Any, name: str) -> int:
    """Return a size of a layer, averaged where it differs by layer; 0 where the config does not say it."""
    sizes = sizes_of(config, name)
    return round(sum(sizes) / len(sizes)) if sizes else 0
