"""Ulysses: one all-to-all gives each rank all tokens of some heads, another gives them back.

DeepSpeed-Ulysses (arXiv:2309.14509), with what real models and packs need: slices of tokens that differ by one, query
heads that no degree divides, fewer key-value heads than ranks, ranks without a token. T = tokens of the group, t =
tokens of this rank, H = query heads, h = query heads of a rank, D = head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.gather import attend_gathered
from hf_hetero.attention.kernels.contract import Scores, Segments
from hf_hetero.attention.ring import attend_in_rounds
from hf_hetero.attention.routes import gather_route, ring_route
from hf_hetero.attention.traffic import all_to_all
from hf_hetero.heads import HeadShare, share_heads
from hf_hetero.layout import Layout, blocks_of

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scores], torch.Tensor]
"""Attention of all tokens of a group and some of the heads."""


def ulysses(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: AttentionContext, scores: Scores, layer: int
) -> torch.Tensor:
    """Exact causal attention of a pack that is spread over a group in consecutive slices.

    Args:
        q: shape (t, H, D).
        k, v: shape (t, num_kv_heads, D).
        context: group, layout and kernel.
        scores: scaling and features of this layer.
        layer: for messages.

    Returns:
        Shape (t, H, size of a value).

    Raises:
        CollectiveFailed: an exchange failed or waited longer than the group's timeout.
    """
    layout = context.layout
    segments: Segments = context.made("pack", lambda: Segments.packed(layout.lengths, context.device))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        return context.kernel(q, k, v, segments, scores)

    if layout.degree == 1 or layout.num_tokens == 0:
        return attend(q, k, v, scores)
    assert context.process_group is not None
    place = context.group_rank, layout.rank_tokens, context.process_group
    return attend_by_heads(q, k, v, context, *place, attend, scores, layer)


def ulysses_ring(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: AttentionContext, scores: Scores, layer: int
) -> torch.Tensor:
    """Ulysses inside each block of ranks, a ring among the blocks; as `ulysses`, for a layout of two levels.

    Blocks are ranks with fast links between them, so only keys of few heads cross the slow ones, and the degree may
    exceed the number of heads (USP, arXiv:2405.07719, and LoongTrain, arXiv:2406.18485, with a ring as in `ring`).
    """
    layout, inner = context.layout, context.layout.inner
    if layout.num_tokens == 0:
        return ulysses(q, k, v, context, scores, layer)
    block, place = divmod(context.group_rank, inner)
    blocks: Layout = context.made("blocks", lambda: blocks_of(layout))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        # the others with this rank's heads stand at the same place in their blocks
        if scores.window is not None:
            route = context.made(
                ("blocks", scores.window), lambda: gather_route(blocks, block, scores.window, context.device)
            )
            members = range(place, layout.degree, inner) if blocks.is_cut else None
            return attend_gathered(q, k, v, context, route, members, scores, layer)
        route = context.made("blocks in rounds", lambda: ring_route(blocks, block, context.device))
        return attend_in_rounds(q, k, v, context, route, context.ranks[place::inner], scores, layer)

    if inner == 1:
        return attend(q, k, v, scores)
    tokens = layout.rank_tokens[block * inner : (block + 1) * inner]
    assert context.inner_group is not None
    return attend_by_heads(q, k, v, context, place, tokens, context.inner_group, attend, scores, layer)


def attend_by_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    context: AttentionContext,
    me: int,
    tokens: tuple[int, ...],
    group: dist.ProcessGroup,
    attend: Attend,
    scores: Scores,
    layer: int,
) -> torch.Tensor:
    """Some tokens of all heads -> all tokens of some heads -> attention -> back.

    Args:
        q, k, v: this rank's rows.
        context: for messages, and to keep what arrived.
        me: place in the group.
        tokens: of each rank of the group.
        group: who exchanges.
        attend: of all tokens, in the order of the ranks.
        scores, layer: of this layer.
    """
    shares = share_heads(q.shape[1], k.shape[1], len(tokens))
    mine, head_dim, value_dim = shares[me], q.shape[2], v.shape[2]

    def sizes(share: HeadShare) -> int:
        return (share.num_q + share.num_kv) * head_dim + share.num_kv * value_dim

    # tokens -> heads: rows arrive in the order of the ranks, which is the order of the pack
    parts = [
        torch.cat(
            [x.flatten(1) for x in (q[:, s.q_start : s.q_end], *(x[:, s.kv_start : s.kv_end] for x in (k, v)))], 1
        )
        for s in shares
    ]
    received = all_to_all(
        torch.cat([part.reshape(-1) for part in parts]),
        [part.numel() for part in parts],
        [num * sizes(mine) for num in tokens],
        group,
        context,
        "Ulysses all-to-all",
        layer,
    )
    widths = [mine.num_q * head_dim, mine.num_kv * head_dim, mine.num_kv * value_dim]
    q_all, k_all, v_all = received.view(sum(tokens), sizes(mine)).split(widths, dim=1)
    q_all, k_all = q_all.unflatten(1, (mine.num_q, head_dim)), k_all.unflatten(1, (mine.num_kv, head_dim))
    v_all = v_all.unflatten(1, (mine.num_kv, value_dim))
    if not mine.is_grouped:
        k_all, v_all = (x[:, list(mine.kv_of_q)] for x in (k_all, v_all))
    out = attend(q_all, k_all, v_all, scores.of_heads(mine.q_start, mine.q_end))

    # heads -> tokens
    out_splits = [tokens[me] * share.num_q * value_dim for share in shares]
    in_splits = [num * mine.num_q * value_dim for num in tokens]
    received = all_to_all(
        out.reshape(-1), in_splits, out_splits, group, context, "Ulysses all-to-all of outputs", layer
    )
    blocks = zip(received.split(out_splits), shares, strict=True)
    return torch.cat([block.view(tokens[me], share.num_q, value_dim) for block, share in blocks], dim=1)
