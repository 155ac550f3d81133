"""Gather: one exchange brings each rank the keys and values that its queries must meet, and no others.

Samples that one rank holds whole stay where they are, so a pack of short samples costs next to nothing, and a group
whose samples are all whole exchanges nothing at all. With a sliding window, only the window before a cut travels. The
gradient of a key flows back the same way. Heads need not divide by the degree.
"""

from __future__ import annotations

import torch

from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.kernels.contract import Scores
from hf_hetero.attention.routes import GatherRoute, gather_route
from hf_hetero.attention.traffic import all_to_all


def gather(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: AttentionContext, scores: Scores, layer: int
) -> torch.Tensor:
    """Exact causal attention of a pack that is spread over a group in any layout.

    Args:
        q: shape (local tokens, num_heads, head_dim).
        k, v: shape (local tokens, num_kv_heads, their head_dim).
        context: group, layout and kernel.
        scores: scaling and features of this layer.
        layer: for messages.

    Returns:
        Shape (local tokens, num_heads, size of a value).

    Raises:
        CollectiveFailed: the exchange failed or waited longer than the group's timeout.
    """
    route: GatherRoute = context.made(
        ("gather", scores.window),
        lambda: gather_route(context.layout, context.group_rank, scores.window, context.device),
    )
    members = range(context.layout.degree)
    return attend_gathered(q, k, v, context, route, members if context.layout.is_cut else None, scores, layer)


def attend_gathered(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    context: AttentionContext,
    route: GatherRoute,
    members: range | None,
    scores: Scores,
    layer: int,
) -> torch.Tensor:
    """Attention along a route.

    Args:
        q, k, v: this rank's rows, as the route counts them.
        context: process group and kernel.
        route: what travels, and who meets whom.
        members: place in the process group of each position in the route; None where nothing travels, which is the same
            on all ranks of the group because all see the same layout.
        scores, layer: of this layer.

    Returns:
        Shape (rows of q, num_heads, size of a value).
    """
    if members is not None:
        assert context.process_group is not None
        sent, received = [0] * context.layout.degree, [0] * context.layout.degree
        size = k.shape[1] * (k.shape[2] + v.shape[2])
        for place, num_sent, num_received in zip(members, route.num_sent, route.num_received, strict=True):
            sent[place], received[place] = size * num_sent, size * num_received
        rows = torch.cat([k[route.send_rows], v[route.send_rows]], dim=2)
        arrived = all_to_all(
            rows.reshape(-1), sent, received, context.process_group, context, "all-to-all of needed keys", layer
        )
        arrived = arrived.view(sum(route.num_received), k.shape[1], k.shape[2] + v.shape[2])
        k, v = torch.cat([k, arrived[..., : k.shape[2]]]), torch.cat([v, arrived[..., k.shape[2] :]])
    if route.meeting.key_rows is not None:
        k, v = k[route.meeting.key_rows], v[route.meeting.key_rows]
    return context.kernel(q, k, v, route.meeting.segments, scores)
