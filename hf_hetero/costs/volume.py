"""Volume counts what attention moves between the ranks of a group: from the layout alone, to the element. No torch.

For one layer without a window, T tokens in a group of d ranks, H query heads and K key-value heads of size D, a rank
sends, in elements:

============  =====================================================  =====================
method        forward                                                backward
============  =====================================================  =====================
ulysses       T / d * (d - 1) / d * D * (2 H + 2 max(K, d))          as forward
gather        the keys and values that others' queries meet          as forward
ring          as gather                                              twice as much
ulysses_ring  ulysses in a block, and ring with the heads of a rank  likewise
token_ring    the queries that meet others' keys; outputs go back    half as much again
============  =====================================================  =====================

With `gather` and `ring` that is nothing for samples that one rank holds whole, and at most T (d - 1) / d * 2 K D. With
`token_ring` a log-sum-exp goes back with each head of an output; in backward queries, gradients of outputs and two
numbers a head leave, and gradients of queries come home. Uneven slices, heads and values of another size are counted
as they are.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from hf_hetero.heads import share_heads
from hf_hetero.layout import Layout, asking, blocks_of, layout_of, needed
from hf_hetero.plan import Group


@dataclass(frozen=True, slots=True)
class Heads:
    """`Heads` count a layer's heads, of queries and of keys, and the elements of a query or key, and of a value.

    `lse_elements` are those that a log-sum-exp takes: its bytes, 4 or more, by those of an element.
    """

    num_q: int
    num_kv: int
    head_dim: int
    value_dim: int
    lse_elements: int = 1


@dataclass(frozen=True, slots=True)
class Volume:
    """A `Volume` counts the elements that one rank sends to others, in a forward and a backward pass of one layer."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Return the sum of both."""
        return self.forward + self.backward

    def __add__(self, other: Volume) -> Volume:
        return Volume(self.forward + other.forward, self.backward + other.backward)


class Meeting(NamedTuple):
    """A `Meeting` is what it takes that all queries of a group meet their keys, where ranks share tokens.

    Args:
        pairs: `causal_pairs` of the busiest rank, or block of ranks that exchange heads.
        moved: tokens whose keys the busiest of them moves; in a token ring, those whose queries it moves.
        fetched: tokens whose keys the busiest rank would move if there were no blocks.
        is_cut: some sample is held by more than one of them.
    """

    pairs: int
    moved: int
    fetched: int
    is_cut: bool


class Batch(tuple[int, ...]):
    """A `Batch` is the tokens of each sample of a global batch, and remembers what meets in groups of them.

    To plan is to price the same groups many times: by several methods, and by what they do to hold more tokens.
    """

    @cached_property
    def known(self) -> dict[tuple[tuple[int, ...], int, int | None, bool], Meeting]:
        """Map samples, degree, ranks of a block, and whether queries travel, to what meets there."""
        return {}


def meeting_of(group: Group, lengths: Sequence[int]) -> Meeting:
    """Count what meets in a plan's group, whose ranks share tokens.

    Args:
        group: its method is any but "ulysses".
        lengths: tokens of each sample of the global batch; a `Batch` is asked first.
    """
    known, by_queries = lengths.known if isinstance(lengths, Batch) else {}, group.method == "token_ring"
    key = (group.samples, group.degree, group.ulysses_degree, by_queries)
    if (meeting := known.get(key)) is None:
        layout = layout_of(group, lengths)
        blocks, fetched = blocks_of(layout) if layout.inner > 1 else layout, travelling_tokens(layout)
        moved = travelling_queries(layout) if by_queries else fetched if blocks is layout else travelling_tokens(blocks)
        meeting = known[key] = Meeting(causal_pairs(blocks, by_queries), moved, fetched, blocks.is_cut)
    return meeting


def volume(layout: Layout, method: str, heads: Heads, rank: int, window: int | None = None) -> Volume:
    """Count the elements that a rank sends.

    Args:
        layout: of the group.
        method: how attention crosses its ranks.
        heads: of the layer.
        rank: position in the group.
        window: tokens that a query of the layer sees; None means all before it.
    """
    if layout.degree == 1 or not layout.num_tokens:
        return Volume(0, 0)
    if method == "ulysses":
        return _by_heads(layout.rank_tokens, heads, rank)
    if method == "token_ring" and window is None:
        return _by_queries(layout, heads, rank)
    if method != "ulysses_ring":
        return _by_keys(layout, heads, rank, method == "ring" and window is None, window)
    block, place = divmod(rank, layout.inner)
    share = share_heads(heads.num_q, heads.num_kv, layout.inner)[place]
    # key-value heads that do not serve equal runs of query heads are copied before they travel
    own = Heads(share.num_q, share.num_kv if share.is_grouped else share.num_q, heads.head_dim, heads.value_dim)
    tokens = layout.rank_tokens[block * layout.inner : (block + 1) * layout.inner]
    return _by_heads(tokens, heads, place) + _by_keys(blocks_of(layout), own, block, window is None, window)


def travelling_tokens(layout: Layout) -> int:
    """Count the tokens whose keys the busiest rank sends, or receives, in one exchange of all keys needed.

    A causal query meets all keys before it, so a rank needs of each cut sample everything before its last query. That
    saves a walk over all pairs of ranks, which planning could not afford.
    """
    spans_of: dict[int, list[tuple[int, int, int]]] = {}
    for rank, spans in enumerate(layout.spans):
        for span in spans:
            if span.num_tokens < layout.lengths[span.sample]:
                spans_of.setdefault(span.sample, []).append((span.start, span.end, rank))
    sent, received = [0] * layout.degree, [0] * layout.degree
    for spans in spans_of.values():
        last_end: dict[int, int] = {}
        for start, end, rank in sorted(spans):
            last_end[rank] = end
            received[rank] -= end - start  # its own
        ends = sorted(last_end.values())
        for rank, end in last_end.items():
            received[rank] += end  # all before its last query
        for start, end, rank in spans:
            # ranks whose last query is after this span's start meet it; one of them is the rank itself, which has it
            later = len(ends) - bisect_right(ends, start) - 1
            sent[rank] += (end - start) * later
    return max(max(sent), max(received))


def travelling_queries(layout: Layout) -> int:
    """Count the tokens whose queries the busiest rank sends, or receives, where keys stay and all queries needed go.

    A query goes to each rank that has a key before it; of a span, either all queries have one there, or none has.
    """
    first: dict[int, dict[int, int]] = {}  # of each cut sample, by rank: the first key that the rank has
    queries: dict[int, list[tuple[int, int, int]]] = {}
    for rank, spans in enumerate(layout.spans):
        for span in spans:
            if span.num_tokens < layout.lengths[span.sample]:
                starts = first.setdefault(span.sample, {})
                starts[rank] = min(span.start, starts.get(rank, span.start))
                queries.setdefault(span.sample, []).append((span.start, span.num_tokens, rank))
    sent, received = [0] * layout.degree, [0] * layout.degree
    for sample, starts in first.items():
        ordered = sorted(starts.values())
        for rank, start in starts.items():
            received[rank] += layout.lengths[sample] - start  # all behind its first key, less its own
        for start, num_tokens, rank in queries[sample]:
            # ranks whose first key is before this span meet it, less the rank itself, which may be one of them
            sent[rank] += num_tokens * (bisect_left(ordered, start) - (starts[rank] < start))
            received[rank] -= num_tokens
    return max(max(sent), max(received))


def causal_pairs(layout: Layout, by_keys: bool = False) -> int:
    """Count twice the pairs of a query and a key of the busiest rank, where ranks share tokens: `s**2` for a sample.

    Queries `start` to `end` meet about `(end**2 - start**2) / 2` keys; the halves are in `attention_s_per_token2`.

    Args:
        by_keys: the rank that holds the key computes a pair, not the one that holds the query.
    """
    if by_keys:
        lengths = layout.lengths
        return max(
            sum((lengths[s.sample] - s.start) ** 2 - (lengths[s.sample] - s.end) ** 2 for s in spans)
            for spans in layout.spans
        )
    return max(sum(span.end**2 - span.start**2 for span in spans) for spans in layout.spans)


def _by_heads(tokens: tuple[int, ...], heads: Heads, me: int) -> Volume:
    """Count what one rank sends in the all-to-alls from tokens to heads and back."""
    shares = share_heads(heads.num_q, heads.num_kv, len(tokens))
    others = [rank for rank in range(len(tokens)) if rank != me]
    inputs = [(s.num_q + s.num_kv) * heads.head_dim + s.num_kv * heads.value_dim for s in shares]
    outputs = [s.num_q * heads.value_dim for s in shares]
    theirs = sum(tokens[rank] for rank in others)
    return Volume(
        tokens[me] * sum(inputs[rank] for rank in others) + theirs * outputs[me],
        theirs * inputs[me] + tokens[me] * sum(outputs[rank] for rank in others),
    )


def _by_keys(layout: Layout, heads: Heads, me: int, again: bool, window: int | None) -> Volume:
    """Count keys that go to queries, and gradients that come back; `again` where backward must fetch keys anew."""
    if not layout.is_cut:
        return Volume(0, 0)
    others = [rank for rank in range(layout.degree) if rank != me]
    size = heads.num_kv * (heads.head_dim + heads.value_dim)
    sent = size * sum(s.num_tokens for rank in others for s in needed(layout, rank, me, window))
    received = size * sum(s.num_tokens for rank in others for s in needed(layout, me, rank, window))
    return Volume(sent, received + (sent if again else 0))


def _by_queries(layout: Layout, heads: Heads, me: int) -> Volume:
    """Count queries that go to keys, and what comes back for them; in backward, with what that takes."""
    others = [rank for rank in range(layout.degree) if rank != me]
    sent = heads.num_q * sum(s.num_tokens for rank in others for s in asking(layout, me, rank))
    answered = heads.num_q * sum(s.num_tokens for rank in others for s in asking(layout, rank, me))
    number = heads.lse_elements
    return Volume(
        sent * heads.head_dim + answered * (heads.value_dim + number),
        sent * (heads.head_dim + heads.value_dim + 2 * number) + answered * heads.head_dim,
    )
