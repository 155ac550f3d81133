"""Ulysses gives each rank all tokens of some heads by one all-to-all, and gives them back by another.

DeepSpeed-Ulysses (arXiv:2309.14509), with what real models and packs need: slices of tokens that differ by one, query
heads that no degree divides, fewer key-value heads than ranks, ranks without a token.

Why that is exact, however uneven. Heads do not know of each other: head i of the output depends on query head i and on
the key-value head that serves it, and on all tokens. `share_heads` cuts the query heads into consecutive runs, one for
each rank, some of them empty, and sends each run with every key-value head that serves any of it. So each query head is
computed once, on one rank, from all tokens; and outputs of the ranks in order are all heads in order. A key-value head
whose query heads are on two ranks travels to both. Its gradient is a sum over the query heads that it serves, each rank
has the terms of its own, and slicing the head out twice adds them up in backward. How many tokens or heads a rank has
enters only the sizes of the messages, which every rank reads from the layout; nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hf_hetero.attention.context import AttentionContext, Peers, Place
from hf_hetero.attention.gather import attend_gathered
from hf_hetero.attention.kernels.contract import Scores, Segments
from hf_hetero.attention.ring import attend_in_rounds
from hf_hetero.attention.routes import MeetingAhead, Rows, gather_route, meeting_ahead, ring_route
from hf_hetero.attention.traffic import all_to_all
from hf_hetero.heads import HeadShare, share_heads
from hf_hetero.layout import Layout, Span, blocks_of

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scores], torch.Tensor]
"""Attention of all tokens of some ranks and some of the heads."""


def ulysses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, place: Place) -> torch.Tensor:
    """Compute attention of a pack that is spread over a group in consecutive slices (`methods.attend`)."""
    context, layout = place.context, place.context.layout
    segments: Segments = context.shared(
        ("pack", scores.causal), lambda: Segments.packed(layout.lengths, context.device, scores.causal)
    )

    def keys_ahead() -> MeetingAhead | None:
        whole = [Span(sample, 0, length) for sample, length in enumerate(layout.lengths)]
        return meeting_ahead(whole, Rows(whole), context.mutual_of(scores), context.device)

    ahead: MeetingAhead | None = context.shared(("pack ahead", scores.mutual), keys_ahead)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        return context.kernel(q, k, v, segments, scores, None if ahead is None else ahead.met(k, v))

    # a group without a token exchanges nothing: all of its ranks see so in the layout
    if layout.degree == 1 or layout.num_tokens == 0:
        return attend(q, k, v, scores)
    return attend_by_heads(q, k, v, scores, place, context.peers, attend)


def ulysses_ring(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, place: Place) -> torch.Tensor:
    """Compute attention by Ulysses inside each block of ranks, by a ring among the blocks, in a layout of two levels.

    Blocks are ranks with fast links between them, so only keys of few heads cross the slow ones, and the degree may
    exceed the number of heads (USP, arXiv:2405.07719, and LoongTrain, arXiv:2406.18485, with a ring as in `ring`).
    """
    context = place.context
    if context.layout.num_tokens == 0:
        return ulysses(q, k, v, scores, place)
    blocks: Layout = context.shared("blocks", lambda: blocks_of(context.layout))
    across = _across_blocks(context, blocks)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        if scores.window is not None or scores.mutual:
            route = context.shared(
                ("blocks", scores.window, scores.mutual),
                lambda: gather_route(blocks, across.me, scores.window, context.device, context.mutual_of(scores)),
            )
            return attend_gathered(q, k, v, scores, place, across if blocks.is_cut else None, route)
        route = context.shared("blocks in rounds", lambda: ring_route(blocks, across.me, context.device))
        return attend_in_rounds(q, k, v, scores, place, across, route)

    if context.layout.inner == 1:
        return attend(q, k, v, scores)
    return attend_by_heads(q, k, v, scores, place, _in_block(context), attend)


def _in_block(context: AttentionContext) -> Peers:
    """Return the ranks of this rank's block: they share its tokens' heads."""
    peers, inner = context.peers, context.layout.inner
    first = peers.me - peers.me % inner
    block = slice(first, first + inner)
    return Peers(context.inner_group, peers.ranks[block], peers.me - first, peers.tokens[block])


def _across_blocks(context: AttentionContext, blocks: Layout) -> Peers:
    """Return the ranks at this rank's place in every block: they have its heads, each with all tokens of its block."""
    peers, inner = context.peers, context.layout.inner
    return Peers(peers.group, peers.ranks[peers.me % inner :: inner], peers.me // inner, blocks.rank_tokens)


def attend_by_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scores: Scores,
    place: Place,
    peers: Peers,
    attend: Attend,
) -> torch.Tensor:
    """Give some tokens of all heads for all tokens of some heads, attend, and give back.

    Args:
        q, k, v: this rank's rows; shapes (t, H, D), (t, Hk, D) and (t, Hk, Dv).
        scores: of this layer, for all heads.
        place: the layer.
        peers: who shares the heads.
        attend: of all their tokens, in the order of the ranks.

    Returns:
        Shape (t, H, Dv).
    """
    shares = share_heads(q.shape[1], k.shape[1], len(peers.ranks))
    mine = shares[peers.me]
    q_all, k_all, v_all = _to_heads(q, k, v, shares, peers, place)
    # kernels want heads of keys that serve equal runs of queries: else each is repeated for every query head, and
    # indexing it several times adds up its gradients
    if not mine.is_grouped:
        k_all, v_all = (x[:, list(mine.kv_of_q)] for x in (k_all, v_all))
    out = attend(q_all, k_all, v_all, scores.of_heads(mine.q_start, mine.q_end))
    return _to_tokens(out, shares, peers, place)


def _to_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shares: Sequence[HeadShare], peers: Peers, place: Place
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries (T, h, D), keys (T, hk, D) and values (T, hk, Dv) of this rank's heads, of all peers' tokens."""
    mine, head_dim, value_dim = shares[peers.me], q.shape[2], v.shape[2]
    widths = [mine.num_q * head_dim, mine.num_kv * head_dim, mine.num_kv * value_dim]
    # queries, keys and values of a token side by side: one exchange instead of three
    parts = [
        torch.cat(
            [x.flatten(1) for x in (q[:, s.q_start : s.q_end], *(x[:, s.kv_start : s.kv_end] for x in (k, v)))], 1
        )
        for s in shares
    ]
    arrived = all_to_all(
        torch.cat([part.reshape(-1) for part in parts]),
        [part.numel() for part in parts],
        [num * sum(widths) for num in peers.tokens],
        peers,
        "Ulysses all-to-all",
        place,
    )
    # rows arrive in the order of the ranks, which is the order of the pack
    q_all, k_all, v_all = arrived.view(sum(peers.tokens), sum(widths)).split(widths, dim=1)
    q_all, k_all = q_all.unflatten(1, (mine.num_q, head_dim)), k_all.unflatten(1, (mine.num_kv, head_dim))
    return q_all, k_all, v_all.unflatten(1, (mine.num_kv, value_dim))


def _to_tokens(out: torch.Tensor, shares: Sequence[HeadShare], peers: Peers, place: Place) -> torch.Tensor:
    """Return outputs (t, H, Dv) of this rank's tokens, from outputs (T, h, Dv) of this rank's heads."""
    num_tokens, value_dim = peers.tokens[peers.me], out.shape[2]
    in_splits = [num * shares[peers.me].num_q * value_dim for num in peers.tokens]
    out_splits = [num_tokens * share.num_q * value_dim for share in shares]
    arrived = all_to_all(out.reshape(-1), in_splits, out_splits, peers, "Ulysses all-to-all of outputs", place)
    # rank by rank, in the order of heads (`share_heads`)
    heads = zip(arrived.split(out_splits), shares, strict=True)
    return torch.cat([part.view(num_tokens, share.num_q, value_dim) for part, share in heads], dim=1)
