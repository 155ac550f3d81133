"""Gather brings each rank, in one exchange, the keys and values that its queries must meet, and no others.

Samples that one rank holds whole stay where they are, so a pack of short samples costs next to nothing, and a group
whose samples are all whole exchanges nothing at all. With a sliding window, only the window before a cut travels. The
gradient of a key flows back the same way. Heads need not divide by the degree.
"""

from __future__ import annotations

import torch

from hf_hetero.attention.context import Peers, Place
from hf_hetero.attention.kernels.contract import Scores
from hf_hetero.attention.routes import GatherRoute, gather_route
from hf_hetero.attention.traffic import all_to_all


def gather(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, place: Place) -> torch.Tensor:
    """Compute attention of a pack that is spread over a group in any layout (`methods.attend`)."""
    context, layout = place.context, place.context.layout
    mutual = context.mutual_of(scores)
    route: GatherRoute = context.shared(
        ("gather", scores.window, scores.mutual),
        lambda: gather_route(layout, context.group_rank, scores.window, context.device, mutual),
    )
    return attend_gathered(q, k, v, scores, place, context.peers if layout.is_cut else None, route)


def attend_gathered(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scores: Scores,
    place: Place,
    peers: Peers | None,
    route: GatherRoute,
) -> torch.Tensor:
    """Compute attention along a route.

    Args:
        q, k, v: this rank's rows, as the route counts them; shapes (t, H, D), (t, Hk, D) and (t, Hk, Dv).
        scores: of this layer.
        place: the layer.
        peers: the ranks of the route; None where nothing travels, which is the same on all of them because all see the
            same layout.
        route: what travels, and who meets whom.

    Returns:
        Shape (t, H, Dv).
    """
    if peers is not None:
        num_heads, key_dim = k.shape[1:]
        width = num_heads * (key_dim + v.shape[2])
        # keys and values side by side travel in one message; where a row goes to several ranks, indexing it several
        # times adds up their gradients in backward
        rows = torch.cat([k[route.send_rows], v[route.send_rows]], dim=2)
        arrived = all_to_all(
            rows.reshape(-1),
            [width * num for num in route.num_sent],
            [width * num for num in route.num_received],
            peers,
            "all-to-all of needed keys",
            place,
        ).view(sum(route.num_received), num_heads, key_dim + v.shape[2])
        # own rows first, then those of the others by rank: the buffer that the route's meeting counts in
        k, v = torch.cat([k, arrived[..., :key_dim]]), torch.cat([v, arrived[..., key_dim:]])
    ahead = None if route.ahead is None else route.ahead.met(k, v)
    meeting = route.meeting
    return place.context.kernel(q, meeting.keys_of(k), meeting.keys_of(v), meeting.segments, scores, ahead)
