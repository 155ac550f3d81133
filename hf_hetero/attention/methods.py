"""The methods by which attention crosses the ranks of a group, by the name that a plan gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.gather import gather
from hf_hetero.attention.kernels.contract import Scores
from hf_hetero.attention.ring import ring
from hf_hetero.attention.ulysses import ulysses, ulysses_ring

Method = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionContext, Scores, int], torch.Tensor]
"""(q, k, v, context, scores, layer) -> out. q: (local tokens, num_heads, head_dim); k: (local tokens, num_kv_heads,
head_dim); v and out as k and q, in the size of a value. Exact in forward and backward, whatever the layout holds."""

METHODS: Mapping[str, Method] = MappingProxyType(
    {"ulysses": ulysses, "gather": gather, "ring": ring, "ulysses_ring": ulysses_ring}
)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: AttentionContext, scores: Scores, layer: int
) -> torch.Tensor:
    """Attention by the method of the context. A group of one rank exchanges nothing, whatever its method."""
    method = ulysses if context.layout.degree == 1 else METHODS[context.method]
    return method(q, k, v, context, scores, layer)
