"""A layout says which tokens of a group's pack each of its ranks holds: the one type that all methods share.

A group packs its samples one after the other, without padding. A layout cuts the pack into spans and gives each rank
some of them; the spans of a rank, in order, are what the rank has in memory. Where ranks exchange heads instead, each
computes a `HeadShare` of all tokens (`heads`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

from hf_hetero.plan import Group

EVEN_WORK_TOKENS = 48 * 1024
"""Length of a sample at which attention takes as long as all else: parameters / (layers * hidden), 37K for a model of
1B and 61K for one of 8B. `zigzag` weighs samples by it; another value balances a little worse, no more."""

Mutual = Mapping[int, tuple[tuple[int, int], ...]]
"""Sample of a pack -> stretches, ascending, whose tokens look at each other: the first token of each, and its end."""
NOWHERE: Mutual = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Span:
    """A `Span` is tokens `start` to `end` (exclusive) of one sample; `sample` is its position in the pack."""

    sample: int
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        """Count the tokens of the span."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Layout:
    """A `Layout` lists the spans of each rank of a group.

    Args:
        lengths: tokens of each packed sample, in packing order.
        spans: for each rank of the group, its spans in memory order.
        kind: "contiguous": the ranks hold consecutive equal slices of the pack; "zigzag": see `zigzag`.
        inner: where a group shares heads inside blocks of ranks and keys among the blocks, the ranks of a block, which
            hold consecutive slices of what the block holds; else 1.
    """

    lengths: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]
    kind: str = "contiguous"
    inner: int = 1

    @property
    def degree(self) -> int:
        """Count the ranks of the group."""
        return len(self.spans)

    @property
    def num_tokens(self) -> int:
        """Count the tokens of the whole pack."""
        return sum(self.lengths)

    @property
    def rank_tokens(self) -> tuple[int, ...]:
        """Count the tokens that each rank holds; 0 is allowed."""
        return tuple(sum(span.num_tokens for span in spans) for spans in self.spans)

    @property
    def is_cut(self) -> bool:
        """Tell whether a sample is held by more than one rank."""
        return any(span.num_tokens < self.lengths[span.sample] for spans in self.spans for span in spans)

    def in_chunks(self, num_tokens: int) -> Layout:
        """Return the same tokens in the same places, as if each chunk of a sample were a sample of its own."""
        first, lengths = [0], list[int]()  # of each sample: its first chunk
        for length in self.lengths:
            lengths += [min(num_tokens, length - start) for start in range(0, length, num_tokens)]
            first.append(len(lengths))

        def parts(span: Span) -> Iterator[Span]:
            for number in range(span.start // num_tokens, -(-span.end // num_tokens)):
                at = number * num_tokens
                yield Span(first[span.sample] + number, max(span.start - at, 0), min(span.end - at, num_tokens))

        spans = tuple(tuple(part for span in spans for part in parts(span)) for spans in self.spans)
        return Layout(tuple(lengths), spans, self.kind, self.inner)

    @property
    def cu_seqlens(self) -> tuple[int, ...]:
        """Say where each sample starts in the pack, and where it ends: flash-attn's own spelling."""
        return (0, *accumulate(self.lengths))

    @property
    def max_seqlen(self) -> int:
        """Count the tokens of the longest sample; 0 for an empty pack."""
        return max(self.lengths, default=0)


def layout_of(group: Group, lengths: Sequence[int]) -> Layout:
    """Lay out the samples of a plan's group as its method is best at.

    Args:
        group: of a plan.
        lengths: tokens of each sample of the global batch.
    """
    packed = [lengths[sample] for sample in group.samples]
    if group.method == "ulysses":
        return contiguous(packed, group.degree)
    if group.ulysses_degree is not None:
        return two_level(packed, group.degree, group.ulysses_degree)
    return zigzag(packed, group.degree)


def equal_splits(total: int, parts: int) -> tuple[int, ...]:
    """Split `total` into `parts` integers that differ by one at most, larger ones first.

    >>> equal_splits(10, 4)
    (3, 3, 2, 2)
    """
    base, extra = divmod(total, parts)
    return tuple(base + (part < extra) for part in range(parts))


def contiguous(lengths: Sequence[int], degree: int) -> Layout:
    """Cut the pack into consecutive slices, equal to one token: no padding, no divisibility.

    >>> contiguous([3, 2], 2).spans
    ((Span(sample=0, start=0, end=3),), (Span(sample=1, start=0, end=2),))
    """
    whole = [Span(sample, 0, length) for sample, length in enumerate(lengths)]
    return Layout(tuple(lengths), _slices(whole, degree))


def zigzag(lengths: Sequence[int], degree: int) -> Layout:
    """Deal long samples over all ranks, keep short ones whole on one: little to exchange, even causal work.

    A sample that has more tokens, or more work, than a rank's share is cut into two pieces a rank, of which rank r
    holds number r from the front and number r from the back, so that each rank has the same tokens of it and the same
    pairs of them (zigzag, as in Llama 3's context parallelism, arXiv:2407.21783, section 3.3.2). The others, longest
    first, each go whole to the rank with the most room, and are cut only where none has enough. All ranks hold equal
    tokens, to one.

    >>> zigzag([8, 1, 1], 2).spans
    ((Span(sample=0, start=0, end=2), Span(sample=0, start=6, end=8), Span(sample=1, start=0, end=1)), \
(Span(sample=0, start=2, end=6), Span(sample=2, start=0, end=1)))
    """
    order = sorted(range(len(lengths)), key=lambda sample: -lengths[sample])
    work = [length * (length + EVEN_WORK_TOKENS) for length in lengths]
    # a tenth above a share is let pass: a sample is not cut, and its keys sent around, for a little imbalance
    share_tokens, share_work = sum(lengths) / degree, 1.1 * sum(work) / degree
    spans_of: list[list[Span]] = [[] for _ in range(degree)]
    room = [0] * degree  # below 0 until all long samples are dealt
    num_shared = sum(length > share_tokens or work[i] > share_work for i, length in enumerate(lengths))
    for sample in order[:num_shared]:
        _deal_in_zigzag(sample, lengths[sample], spans_of, room)
    # the fullest ranks get the larger splits, so that none has more than its split already
    for rank, tokens in zip(
        sorted(range(degree), key=lambda rank: room[rank]), equal_splits(sum(lengths), degree), strict=True
    ):
        room[rank] += tokens
    emptiest = [(-tokens, rank) for rank, tokens in enumerate(room)]
    heapq.heapify(emptiest)
    for sample in order[num_shared:]:
        start, length = 0, lengths[sample]
        while start < length:
            tokens, rank = heapq.heappop(emptiest)
            end = min(length, start - tokens)
            spans_of[rank].append(Span(sample, start, end))
            heapq.heappush(emptiest, (tokens + end - start, rank))
            start = end
    spans = tuple(_joined(sorted(spans, key=lambda span: (span.sample, span.start))) for spans in spans_of)
    return Layout(tuple(lengths), spans, "zigzag")


def two_level(lengths: Sequence[int], degree: int, inner: int) -> Layout:
    """Lay a zigzag over blocks of `inner` ranks, and cut a block's spans into consecutive slices for its ranks."""
    blocks = zigzag(lengths, degree // inner)
    spans = tuple(share for block in blocks.spans for share in _slices(block, inner))
    return Layout(blocks.lengths, spans, blocks.kind, inner)


def blocks_of(layout: Layout) -> Layout:
    """Return the layout over the blocks of a group: what each of them holds in all."""
    ranks = range(0, layout.degree, layout.inner)
    spans = tuple(_joined(s for rank_spans in layout.spans[r : r + layout.inner] for s in rank_spans) for r in ranks)
    return Layout(layout.lengths, spans, layout.kind)


def needed(
    layout: Layout, receiver: int, sender: int, window: int | None = None, mutual: Mutual = NOWHERE
) -> tuple[Span, ...]:
    """Find the keys of one rank that the queries of another must meet, in the order the sender holds them.

    Args:
        layout: who holds what.
        receiver, sender: ranks of the group, by position.
        window: tokens that a query sees, itself included; None means all before it.
        mutual: where queries see those after them, too.
    """
    ranges_of: dict[int, list[tuple[int, int]]] = {}  # of each sample, what the receiver's queries see
    for span in layout.spans[receiver]:
        first = 0 if window is None else max(0, span.start - window + 1)
        ranges = ranges_of.setdefault(span.sample, [])
        # merged with the one before where they meet, so that no key is sent twice
        if ranges and first <= ranges[-1][1]:
            first, _ = ranges.pop()
        ranges.append((first, next((b for a, b in mutual.get(span.sample, ()) if a < span.end < b), span.end)))
    return tuple(
        Span(span.sample, max(span.start, first), min(span.end, end))
        for span in layout.spans[sender]
        for first, end in ranges_of.get(span.sample, ())
        if max(span.start, first) < min(span.end, end)
    )


def asking(layout: Layout, asker: int, holder: int) -> tuple[Span, ...]:
    """Find the queries of one rank that meet a key of another, in the order the asker holds them; both by position."""
    # descending, so that of each sample the first token stays that the holder has
    first = {s.sample: s.start for s in sorted(layout.spans[holder], key=lambda span: -span.start)}
    return tuple(span for span in layout.spans[asker] if first.get(span.sample, span.start) < span.start)


def _deal_in_zigzag(sample: int, length: int, spans_of: list[list[Span]], room: list[int]) -> None:
    """Deal two pieces of one sample to each rank, and tokens that do not divide to the ranks that hold the fewest."""
    # Of 2d pieces of c tokens, piece i meets i whole pieces and half of itself: (i + 1/2) c^2 pairs. Rank r has the
    # pieces r and 2d - 1 - r, so 2d c^2 pairs, whatever r is.
    degree = len(spans_of)
    piece, left = divmod(length, 2 * degree)
    sizes = [piece] * (2 * degree)
    emptiest = sorted(range(degree), key=lambda rank: -room[rank])
    for extra in range(left):
        sizes[emptiest[extra] if extra < degree else -1 - emptiest[extra - degree]] += 1
    ends = list(accumulate(sizes))
    for position, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        rank = min(position, 2 * degree - 1 - position)
        if size:
            spans_of[rank].append(Span(sample, end - size, end))
            room[rank] -= size


def _slices(spans: Sequence[Span], parts: int) -> tuple[tuple[Span, ...], ...]:
    """Cut spans into consecutive slices, equal to one token."""
    # in one walk over the spans: a group may be a thousand ranks, with as many samples and more
    rest = [span for span in reversed(spans) if span.num_tokens]
    slices: list[tuple[Span, ...]] = []
    for num_tokens in equal_splits(sum(span.num_tokens for span in spans), parts):
        own: list[Span] = []
        while num_tokens:
            span = rest.pop()
            end = min(span.end, span.start + num_tokens)
            if end < span.end:
                rest.append(Span(span.sample, end, span.end))
            own.append(Span(span.sample, span.start, end))
            num_tokens -= end - span.start
        slices.append(tuple(own))
    return tuple(slices)


def _joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Join spans that follow each other: the same tokens in as few spans as can be."""
    joined: list[Span] = []
    for span in spans:
        if joined and (joined[-1].sample, joined[-1].end) == (span.sample, span.start):
            joined[-1] = Span(span.sample, joined[-1].start, span.end)
        else:
            joined.append(span)
    return tuple(joined)
