"""Which tokens of a group's pack each of its ranks holds: the one type that all attention methods share.

A group packs its samples one after the other, without padding. A layout cuts the pack into spans and gives each rank
some of them; the spans of a rank, in order, are what the rank has in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` to `end` (exclusive) of one sample; `sample` is its position in the pack."""

    sample: int
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the span."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Layout:
    """The spans of each rank of a group.

    Args:
        lengths: tokens of each packed sample, in packing order.
        spans: for each rank of the group, its spans in memory order.
        kind: "contiguous": the ranks hold consecutive equal slices of the pack.
    """

    lengths: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]
    kind: str = "contiguous"

    @property
    def degree(self) -> int:
        """Ranks of the group."""
        return len(self.spans)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole pack."""
        return sum(self.lengths)

    @property
    def rank_tokens(self) -> tuple[int, ...]:
        """Tokens that each rank holds; 0 is allowed."""
        return tuple(sum(span.num_tokens for span in spans) for spans in self.spans)

    @property
    def cu_seqlens(self) -> tuple[int, ...]:
        """Where each sample starts in the pack, and the end: flash-attn's own spelling."""
        return (0, *accumulate(self.lengths))

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sample; 0 for an empty pack."""
        return max(self.lengths, default=0)


def equal_splits(total: int, parts: int) -> tuple[int, ...]:
    """`total` in `parts` integers that differ by one at most, larger ones first.

    >>> equal_splits(10, 4)
    (3, 3, 2, 2)
    """
    base, extra = divmod(total, parts)
    return tuple(base + (part < extra) for part in range(parts))


def contiguous(lengths: Sequence[int], degree: int) -> Layout:
    """Consecutive slices of the pack, equal to one token: no padding, no divisibility.

    >>> contiguous([3, 2], 2).spans
    ((Span(sample=0, start=0, end=3),), (Span(sample=1, start=0, end=2),))
    """
    starts = (0, *accumulate(lengths))
    bounds = (0, *accumulate(equal_splits(sum(lengths), degree)))
    spans = tuple(
        tuple(
            Span(sample, max(low - start, 0), min(high - start, length))
            for sample, (start, length) in enumerate(zip(starts, lengths, strict=False))
            if max(low, start) < min(high, start + length)
        )
        for low, high in pairwise(bounds)
    )
    return Layout(tuple(lengths), spans)
