"""Ulysses over real ranks equals attention on one: output and all gradients, in fp64, to 1e-12."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import run_ranks

from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.kernels import CPU, Pack, Scores
from hf_hetero.attention.ulysses import share_heads, ulysses
from hf_hetero.groups import GroupPool
from hf_hetero.layout import contiguous

PACKS = {
    "many short": [3, 1, 7, 2, 11, 5, 1, 1, 4, 8, 2, 6],
    "one long": [61],
    "fewer tokens than ranks": [2],
    "one token": [1],
    "no tokens": [],
}
HEADS = {
    "mha": (4, 4),
    "gqa": (4, 2),
    "mqa": (4, 1),
    "uneven": (6, 3),
    "straddling": (6, 2),
    "fewer than ranks": (3, 3),
}
FEATURES: dict[str, dict[str, Any]] = {"plain": {}, "all": {"window": 5, "softcap": 3.0, "sinks": True}}


def tensors_of(lengths: list[int], heads: tuple[int, int]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    torch.manual_seed(len(lengths) + heads[0])
    total = sum(lengths)
    qkv = [torch.randn(total, h, 8, dtype=torch.float64) for h in (heads[0], heads[1], heads[1])]
    return qkv, torch.randn(total, heads[0], 8, dtype=torch.float64), torch.randn(heads[0], dtype=torch.float64)


def scores_of(features: dict[str, Any], sinks: torch.Tensor) -> Scores:
    return Scores(0.35, features.get("window"), features.get("softcap"), sinks if features.get("sinks") else None)


def on_one_rank(lengths: list[int], heads: tuple[int, int], features: dict[str, Any]) -> list[torch.Tensor]:
    qkv, weights, sinks = tensors_of(lengths, heads)
    leaves = [x.requires_grad_() for x in (*qkv, sinks)]
    layout = contiguous(lengths, 1)
    pack = Pack(layout.lengths, torch.tensor(layout.cu_seqlens, dtype=torch.int32), layout.max_seqlen)
    out = CPU(*qkv, pack, scores_of(features, sinks))
    grads = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
    return [out.detach(), *(torch.zeros(heads[0]) if g is None else g for g in grads)]


def on_ranks(cases: list[tuple[str, str, str]]) -> list[list[torch.Tensor]]:
    """Each case on this rank's slice: output, dq, dk, dv, and the sinks' gradient."""
    pool = GroupPool((dist.get_world_size(),), 30, 30)
    ranks, me = tuple(range(dist.get_world_size())), dist.get_rank()
    found = []
    for pack, heads, features in cases:
        qkv, weights, sinks = tensors_of(PACKS[pack], HEADS[heads])
        layout = contiguous(PACKS[pack], len(ranks))
        start = sum(layout.rank_tokens[:me])
        mine = slice(start, start + layout.rank_tokens[me])
        leaves = [x[mine].clone().requires_grad_() for x in qkv]
        sinks.requires_grad_()
        context = AttentionContext(layout, ranks, me, pool.get(ranks), "ulysses", CPU, torch.device("cpu"))
        out = ulysses(leaves[0], leaves[1], leaves[2], context, scores_of(FEATURES[features], sinks), layer=0)
        grads = torch.autograd.grad((out * weights[mine]).sum(), [*leaves, sinks], allow_unused=True)
        found.append([out.detach(), *(torch.zeros(len(sinks)) if g is None else g for g in grads)])
    pool.close()
    return found


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_equals_one_rank(num_ranks: int) -> None:
    """Every kind of pack, of heads, and of features; ranks without tokens or heads included."""
    cases = [(pack, heads, features) for pack in PACKS for heads in HEADS for features in FEATURES]
    ranks = run_ranks(on_ranks, num_ranks, cases)
    for number, (pack, heads, features) in enumerate(cases):
        expected = on_one_rank(PACKS[pack], HEADS[heads], FEATURES[features])
        parts = [rank[number] for rank in ranks]
        found = [torch.cat([part[i] for part in parts]) for i in range(4)]
        found.append(torch.stack([part[4] for part in parts]).sum(0))
        for name, ours, theirs in zip(("out", "dq", "dk", "dv", "dsinks"), found, expected, strict=True):
            difference = (ours - theirs).abs().max().item() if theirs.numel() else 0.0
            assert ours.shape == theirs.shape
            assert difference < 1e-12, (pack, heads, features, name, difference)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "degree"), [(4, 2, 4), (6, 3, 4), (8, 8, 8), (3, 1, 4), (7, 1, 3), (6, 2, 4)]
)
def test_heads_are_shared_once(heads: int, kv_heads: int, degree: int) -> None:
    """Each query head is computed by one rank, which has the key-value head it needs; shares differ by one at most."""
    shares = share_heads(heads, kv_heads, degree)
    assert [h for s in shares for h in range(s.q_start, s.q_end)] == list(range(heads))
    assert max(s.num_q for s in shares) - min(s.num_q for s in shares) <= 1
    for share in shares:
        for q, kv in zip(range(share.q_start, share.q_end), share.kv_of_q, strict=True):
            assert share.kv_start + kv == q // (heads // kv_heads)
