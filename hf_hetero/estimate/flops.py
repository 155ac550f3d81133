"""This module counts the operations that training on some samples needs, whatever a plan computes twice.

    a weight that tokens are multiplied with   2 a token forward, 2 backward for what went in, 2 more if it is trained
    a pair of tokens that attend               2 H (D + D_v) a layer forward, twice as many backward
    a number of a state                        6 a token forward, twice as many backward

Pairs are those of causal attention: L (L + 1) / 2 of a sample of L tokens, less where a layer sees a window of them.
Of a mixture of experts, those weights count that a token is sent to. What is recomputed counts once, so that the share
of a card's peak is that of useful work ("model FLOPs utilization", PaLM, arXiv:2204.02311, appendix B, where attention
counts all L^2 pairs). Norms, rotations and the softmax are left out, as there. Blocks of layers that are used several
times (Zamba 2) count once. Below the first adapter nothing needs a gradient, and torch computes none; here that counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from hf_hetero.estimate.active import idle_shares
from hf_hetero.estimate.state_layers import WEIGHTS_A_STATE, numbers_of
from hf_hetero.model.by_layer import of_layer
from hf_hetero.model.wrapped import text_part
from hf_hetero.state_layers.families import family_of, mixers_of, window_of


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """`ModelFlops` are the operations that a model's training needs.

    Args:
        a_token: of each token, whatever it attends to.
        a_pair: of each pair of tokens, for each window of layers; None: they see all before.
        in_layers, in_head: of each token forward, whatever it attends to.
    """

    a_token: float
    a_pair: tuple[tuple[int | None, float], ...]
    in_layers: float = 0.0
    in_head: float = 0.0

    def of(self, lengths: Iterable[int]) -> float:
        """Count the operations of samples with so many tokens, forward and backward; no plan changes them."""
        return sum(
            self.a_token * length + sum(flops * pairs(length, window) for window, flops in self.a_pair)
            for length in lengths
        )


def pairs(length: int, window: int | None = None) -> int:
    """Count the pairs of a token and one that it sees, itself included.

    Args:
        length: tokens of a sample.
        window: most tokens that one sees; None: all before it.
    """
    seen = length if window is None else min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def flops_of(model: Any) -> ModelFlops:
    """Count the operations of a transformers model, with the adapters that it has.

    Args:
        model: on any device, with weights that are whole.
    """
    text = text_part(model)
    idle = idle_shares(text, text.config)
    layers: set[torch.Tensor] = {p for module in text.modules() for p in _matrices(module)}
    head = model.get_output_embeddings()
    # it may be the embedding as well, which alone is only looked up
    heads = {head.weight} if isinstance(head, torch.nn.Linear) else set[torch.Tensor]()
    weights = layers | heads
    a_token = sum((6 if p.requires_grad else 4) * p.numel() * (1 - idle.get(p, 0.0)) for p in weights)
    numbers = sum(numbers_of(mixer) for mixer in mixers_of(text) if window_of(mixer) is None)
    a_pair: dict[int | None, float] = {}
    attending: list[Any] = [module for module in text.modules() if _attends(module)]
    for module in attending:
        layer = of_layer(text.config, module.layer_idx)
        window = _window(module, layer)
        a_pair[window] = a_pair.get(window, 0.0) + 6 * _width(module, layer)
    of_states = 2 * WEIGHTS_A_STATE * numbers
    in_layers, in_head = (sum(2 * p.numel() * (1 - idle.get(p, 0.0)) for p in own) for own in (layers - heads, heads))
    return ModelFlops(a_token + 3 * of_states, tuple(a_pair.items()), in_layers + of_states, in_head)


def _matrices(module: torch.nn.Module) -> Iterable[torch.nn.Parameter]:
    """List a module's own weights that tokens are multiplied with."""
    if isinstance(module, torch.nn.Embedding):
        return []
    return [p for name, p in module.named_parameters(recurse=False) if p.ndim > 1 and "bias" not in name]


def _attends(module: torch.nn.Module) -> bool:
    """Return whether a module is the attention of a layer."""
    has_layer = isinstance(getattr(module, "layer_idx", None), int)
    return has_layer and "Attention" in type(module).__name__ and family_of(module) is None


def _width(module: Any, config: Any) -> int:
    """Count the numbers that a pair of tokens is computed with: of queries, and of values, in all heads."""
    heads = getattr(module, "num_heads", None) or config.num_attention_heads
    head_dim = getattr(module, "head_dim", None) or config.hidden_size // heads
    return heads * (getattr(module, "qk_head_dim", head_dim) + getattr(module, "v_head_dim", head_dim))


def _window(module: Any, config: Any) -> int | None:
    """Return how many tokens one sees in a layer, itself included; None: all before it."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    kinds: list[str] = getattr(config, "layer_types", None) or []
    sees_all = kinds and kinds[module.layer_idx] != "sliding_attention"
    return None if sees_all else getattr(config, "sliding_window", None)
