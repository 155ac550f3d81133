"""Heads are shared so that each is computed once."""

from __future__ import annotations

import pytest

from hf_hetero.heads import share_heads


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
