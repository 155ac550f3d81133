"""This follows Llama 4: layers that attend within chunks of a sample, and queries that grow with their position.

Transformers counts both from the beginning of a row. A row of a plan holds several samples, or a part of one, so here
both are counted from the beginning of each token's sample.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_hetero.attention.context import AttentionContext, Place


def place_of(module: Any, context: AttentionContext, layer: int) -> Place:
    """Return the context as a layer sees it: in chunks, where the layer attends within chunks."""
    config = getattr(module, "config", None)
    kinds, size = getattr(config, "layer_types", None) or [], getattr(config, "attention_chunk_size", None)
    if size is None or layer >= len(kinds) or kinds[layer] != "chunked_attention":
        return context.at(layer)
    return context.in_chunks(size).at(layer)


def at_own_positions(module: Any, query: torch.Tensor, context: AttentionContext) -> torch.Tensor:
    """Undo what queries were scaled by for their positions in the row, and scale them for those in their samples.

    Args:
        module: a layer's attention; others than Llama 4's, whose layers without rotary positions do this, are left.
        query: shape (1, H, n, D), after the module's own scaling (arXiv:2501.19399).
        context: whose tokens they are.
    """
    if not getattr(module, "attn_temperature_tuning", None) or getattr(module, "use_rope", True):
        return query

    def make() -> torch.Tensor:
        spans = context.layout.spans[context.group_rank]
        own = torch.cat([torch.arange(span.start, span.end) for span in spans] or [torch.arange(0)])
        factors = _factor(module, own) / _factor(module, torch.arange(len(own)))
        stand_ins = torch.ones(query.shape[2] - len(own), dtype=factors.dtype)
        return torch.cat([factors, stand_ins]).to(query.device, query.dtype).view(1, 1, -1, 1)

    return query * context.shared(("temperature", module.floor_scale, module.attn_scale), make)


def _factor(module: Any, positions: torch.Tensor) -> torch.Tensor:
    """Return what a query is scaled by at each position, as the module computes it. Shape of the positions."""
    return torch.log1p(torch.floor((positions.double() + 1) / module.floor_scale)) * module.attn_scale + 1
