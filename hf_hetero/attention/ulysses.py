"""Ulysses: one all-to-all gives each rank all tokens of some heads, another gives them back.

DeepSpeed-Ulysses (arXiv:2309.14509), with what real models and packs need: slices of tokens that differ by one, query
heads that no degree divides, fewer key-value heads than ranks, ranks without a token. T = tokens of the group, t =
tokens of this rank, H = query heads, h = query heads of a rank, D = head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives

from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.kernels import Scores
from hf_hetero.groups import named
from hf_hetero.layout import equal_splits


@dataclass(frozen=True, slots=True)
class HeadShare:
    """Heads that one rank computes: query heads `[q_start, q_end)` with key-value heads `[kv_start, kv_end)`.

    `kv_of_q` names, for each query head, its key-value head counted from `kv_start`.
    """

    q_start: int
    q_end: int
    kv_start: int
    kv_end: int
    kv_of_q: tuple[int, ...]

    @property
    def num_q(self) -> int:
        """Query heads."""
        return self.q_end - self.q_start

    @property
    def num_kv(self) -> int:
        """Key-value heads."""
        return self.kv_end - self.kv_start

    @property
    def is_grouped(self) -> bool:
        """Whether the key-value heads serve equal runs of query heads, as kernels expect."""
        if not self.num_kv or self.num_q % self.num_kv:
            return self.num_q == 0
        run = self.num_q // self.num_kv
        return self.kv_of_q == tuple(head // run for head in range(self.num_q))


def share_heads(num_heads: int, num_kv_heads: int, degree: int) -> tuple[HeadShare, ...]:
    """Query heads in near-equal runs; each rank gets every key-value head its run needs, so some travel twice."""
    group_size = num_heads // num_kv_heads
    bounds = (0, *accumulate(equal_splits(num_heads, degree)))
    shares: list[HeadShare] = []
    for start, end in pairwise(bounds):
        kv_start = start // group_size if end > start else 0
        kv_end = (end - 1) // group_size + 1 if end > start else 0
        kv_of_q = tuple(head // group_size - kv_start for head in range(start, end))
        shares.append(HeadShare(start, end, kv_start, kv_end, kv_of_q))
    return tuple(shares)


class _AllToAll(torch.autograd.Function):
    """Uneven all-to-all of a flat buffer; its gradient is the same exchange the other way."""

    @staticmethod
    def forward(
        ctx: Any,
        buffer: torch.Tensor,
        in_splits: list[int],
        out_splits: list[int],
        group: dist.ProcessGroup,
        where: str,
    ) -> torch.Tensor:
        ctx.exchange = (out_splits, in_splits, group, where)
        return _exchange(buffer, in_splits, out_splits, group, "Ulysses all-to-all", where)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        out_splits, in_splits, group, where = ctx.exchange
        grad = _exchange(
            grad_outputs[0].contiguous(), out_splits, in_splits, group, "Ulysses all-to-all of gradients", where
        )
        return grad, None, None, None, None


def _exchange(
    buffer: torch.Tensor,
    in_splits: list[int],
    out_splits: list[int],
    group: dist.ProcessGroup,
    operation: str,
    where: str,
) -> torch.Tensor:
    # functional, so that selective checkpointing can keep its result
    with named(operation, where):
        return collectives.wait_tensor(collectives.all_to_all_single(buffer, out_splits, in_splits, group))


def _all_to_all(
    parts: list[torch.Tensor], out_splits: list[int], context: AttentionContext, layer: int
) -> torch.Tensor:
    assert context.process_group is not None
    buffer = torch.cat([part.reshape(-1) for part in parts])
    in_splits = [part.numel() for part in parts]
    received = _AllToAll.apply(buffer, in_splits, out_splits, context.process_group, context.where(layer))
    assert isinstance(received, torch.Tensor)
    return received


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
        Shape (t, H, D).

    Raises:
        CollectiveFailed: an exchange failed or waited longer than the group's timeout.
    """
    if context.layout.degree == 1 or context.layout.num_tokens == 0:
        return context.kernel(q, k, v, context.pack, scores)
    tokens, me = context.layout.rank_tokens, context.group_rank
    shares = share_heads(q.shape[1], k.shape[1], context.layout.degree)
    mine, head_dim = shares[me], q.shape[2]

    # tokens -> heads: rows arrive in the order of the ranks, which is the order of the pack
    parts = [torch.cat([q[:, s.q_start : s.q_end], *(x[:, s.kv_start : s.kv_end] for x in (k, v))], 1) for s in shares]
    width = mine.num_q + 2 * mine.num_kv
    received = _all_to_all(parts, [num * width * head_dim for num in tokens], context, layer)
    heads = received.view(sum(tokens), width, head_dim)
    q_all, k_all, v_all = heads.split([mine.num_q, mine.num_kv, mine.num_kv], dim=1)
    if not mine.is_grouped:
        k_all, v_all = (x[:, list(mine.kv_of_q)] for x in (k_all, v_all))
    out = context.kernel(q_all, k_all, v_all, context.pack, own_heads(scores, mine))

    # heads -> tokens
    out_splits = [tokens[me] * share.num_q * head_dim for share in shares]
    received = _all_to_all(list(out.split(list(tokens))), out_splits, context, layer)
    blocks = zip(received.split(out_splits), shares, strict=True)
    return torch.cat([block.view(tokens[me], share.num_q, head_dim) for block, share in blocks], dim=1)


def own_heads(scores: Scores, share: HeadShare) -> Scores:
    """Scores for the query heads of one rank: sinks belong to heads."""
    if scores.sinks is None:
        return scores
    return Scores(scores.scaling, scores.window, scores.softcap, scores.sinks[share.q_start : share.q_end])
