"""Layouts hold each token of the pack exactly once, in shares that differ by one at most; so are heads shared."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_hetero.heads import share_heads
from hf_hetero.layout import (
    Layout,
    asking,
    blocks_of,
    contiguous,
    equal_splits,
    layout_of,
    needed,
    two_level,
    zigzag,
)
from hf_hetero.plan import Group

LENGTHS = st.lists(st.integers(1, 50) | st.sampled_from([1, 200, 1000]), max_size=20)


def tokens_of(layout: Layout) -> list[tuple[int, int]]:
    return [(s.sample, t) for spans in layout.spans for s in spans for t in range(s.start, s.end)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 9))
def test_contiguous_covers_the_pack(lengths: list[int], degree: int) -> None:
    """The ranks' spans, in order, are the pack."""
    layout = contiguous(lengths, degree)
    assert tokens_of(layout) == [(sample, token) for sample, length in enumerate(lengths) for token in range(length)]
    assert layout.rank_tokens == equal_splits(sum(lengths), degree)
    assert max(layout.rank_tokens) - min(layout.rank_tokens) <= 1
    assert layout.cu_seqlens[-1] == layout.num_tokens == sum(lengths)
    assert layout.max_seqlen == max(lengths, default=0)
    assert all(span.num_tokens > 0 for spans in layout.spans for span in spans)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9))
def test_zigzag_covers_the_pack(lengths: list[int], degree: int) -> None:
    """Each token once, in equal shares; a rank holds the tokens of a sample in their order."""
    layout = zigzag(lengths, degree)
    assert sorted(tokens_of(layout)) == [(sample, token) for sample, n in enumerate(lengths) for token in range(n)]
    assert sorted(layout.rank_tokens) == sorted(equal_splits(sum(lengths), degree))
    for spans in layout.spans:
        assert sorted(spans, key=lambda span: (span.sample, span.start)) == list(spans)


def test_zigzag_balances_causal_work() -> None:
    """One long sample: each rank meets the same number of earlier tokens, to 1 %; contiguous slices do not."""

    def pairs(layout: Layout) -> list[int]:
        return [sum(s.end * (s.end + 1) - s.start * (s.start + 1) for s in spans) // 2 for spans in layout.spans]

    even, uneven = pairs(zigzag([1001], 4)), pairs(contiguous([1001], 4))
    assert max(even) < 1.01 * min(even)
    assert max(uneven) > 6 * min(uneven)


def test_short_samples_stay_whole() -> None:
    """Of many short samples, only what fills the ranks to the last token is cut; slices cut at every border."""
    lengths = [10 + (37 * sample) % 251 for sample in range(60)]

    def travelling(layout: Layout) -> int:
        ranks = range(layout.degree)
        return sum(s.num_tokens for me in ranks for other in ranks if me != other for s in needed(layout, me, other))

    assert travelling(zigzag(lengths, 4)) < 0.5 * travelling(contiguous(lengths, 4))
    assert not zigzag([5, 5, 5, 5], 4).is_cut
    assert zigzag([10, 5, 5], 4).is_cut


@settings(deadline=None)
@given(LENGTHS, st.sampled_from([(2, 2), (4, 2), (8, 4), (6, 3), (4, 1)]))
def test_two_levels(lengths: list[int], sizes: tuple[int, int]) -> None:
    """Blocks hold a zigzag, and the ranks of a block consecutive slices of it."""
    degree, inner = sizes
    layout = two_level(lengths, degree, inner)
    assert sorted(tokens_of(layout)) == sorted(tokens_of(contiguous(lengths, 1)))
    assert blocks_of(layout).spans == zigzag(lengths, degree // inner).spans
    for first in range(0, degree, inner):
        held = layout.rank_tokens[first : first + inner]
        assert held == equal_splits(sum(held), inner)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 6), st.none() | st.integers(1, 30), st.booleans())
def test_needed_is_what_queries_see(lengths: list[int], degree: int, window: int | None, cut: bool) -> None:
    """Token by token: a key travels if and only if a query of the receiver sees it."""
    layout = (zigzag if cut else contiguous)(lengths, degree)
    owner = {
        (s.sample, t): rank for rank, spans in enumerate(layout.spans) for s in spans for t in range(s.start, s.end)
    }
    for receiver in range(degree):
        seen = {
            (sample, key)
            for sample, token in (pair for pair, rank in owner.items() if rank == receiver)
            for key in range(0 if window is None else max(0, token - window + 1), token + 1)
        }
        for sender in set(range(degree)) - {receiver}:
            found = [(s.sample, t) for s in needed(layout, receiver, sender, window) for t in range(s.start, s.end)]
            assert sorted(found) == sorted(pair for pair in seen if owner[pair] == sender)


@settings(deadline=None, max_examples=50)
@given(LENGTHS.map(lambda lengths: lengths[:8]), st.integers(2, 6), st.booleans())
def test_asking_is_who_meets_a_key(lengths: list[int], degree: int, cut: bool) -> None:
    """Token by token: a query goes to another rank if and only if a key of its sample before it is there."""
    layout = (zigzag if cut else contiguous)(lengths, degree)
    held = [[(s.sample, t) for s in spans for t in range(s.start, s.end)] for spans in layout.spans]
    first = [dict(sorted(tokens, reverse=True)) for tokens in held]
    for asker in range(degree):
        for holder in set(range(degree)) - {asker}:
            asked = [(s.sample, t) for s in asking(layout, asker, holder) for t in range(s.start, s.end)]
            assert asked == [(n, t) for n, t in held[asker] if n in first[holder] and first[holder][n] < t]


def test_each_method_has_its_layout() -> None:
    """Ulysses slices the pack, those that send keys or queries cut it in a zigzag, and ulysses_ring does both."""
    lengths, ranks, samples = [9, 4, 100], (0, 1, 2, 3), (2, 0)
    assert layout_of(Group(ranks, samples), lengths) == contiguous([100, 9], 4)
    assert layout_of(Group(ranks, samples, "gather"), lengths) == zigzag([100, 9], 4)
    assert layout_of(Group(ranks, samples, "ring"), lengths) == zigzag([100, 9], 4)
    assert layout_of(Group(ranks, samples, "token_ring"), lengths) == zigzag([100, 9], 4)
    assert layout_of(Group(ranks, samples, "ulysses_ring", 2), lengths) == two_level([100, 9], 4, 2)


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
