"""Layouts hold each token of the pack exactly once, in shares that differ by one token at most."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hf_hetero.layout import contiguous, equal_splits


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 9))
def test_contiguous_covers_the_pack(lengths: list[int], degree: int) -> None:
    """The ranks' spans, in order, are the pack."""
    layout = contiguous(lengths, degree)
    held = [(s.sample, t) for spans in layout.spans for s in spans for t in range(s.start, s.end)]
    assert held == [(sample, token) for sample, length in enumerate(lengths) for token in range(length)]
    assert layout.rank_tokens == equal_splits(sum(lengths), degree)
    assert max(layout.rank_tokens) - min(layout.rank_tokens) <= 1
    assert layout.cu_seqlens[-1] == layout.num_tokens == sum(lengths)
    assert layout.max_seqlen == max(lengths, default=0)
    assert all(span.num_tokens > 0 for spans in layout.spans for span in spans)
