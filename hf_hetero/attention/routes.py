"""Routes say which rows travel to whom, and which keys each run of queries then meets: a layout as index tensors.

Only keys that another rank's queries must meet travel, so a sample that one rank holds whole costs nothing. Everybody
reads the same layout, so nobody asks anybody, and what one rank sends is what the other expects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from hf_hetero.attention.kernels.contract import Ahead, Segments
from hf_hetero.layout import NOWHERE, Layout, Mutual, Span, asking, needed


@dataclass(frozen=True, slots=True)
class Meeting:
    """A `Meeting` says which queries of this rank meet which keys.

    Args:
        key_rows: rows of the buffer of keys, in the order of the runs; None means all rows as they are.
        segments: the runs.
        q_rows: rows of this rank's queries; None means all.
    """

    key_rows: torch.Tensor | None
    segments: Segments
    q_rows: torch.Tensor | None = None

    def keys_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the keys that are met, of the buffer's rows: keys, values, or both side by side."""
        return rows if self.key_rows is None else rows[self.key_rows]

    def add_to(self, rows: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add the gradients of what `keys_of` has returned to those of the buffer's rows, in their type."""
        if self.key_rows is None:
            rows += gradients
        else:
            rows.index_add_(0, self.key_rows, gradients.to(rows.dtype))


@dataclass(frozen=True, slots=True)
class MeetingAhead:
    """A `MeetingAhead` says which queries of this rank meet which keys after them.

    Args:
        q_rows: of the queries, in the order of the runs; int64.
        key_rows: rows of the buffer of keys, in the order of the runs; int64.
        segments: the runs.
    """

    q_rows: torch.Tensor
    key_rows: torch.Tensor
    segments: Segments

    def met(self, k: torch.Tensor, v: torch.Tensor) -> Ahead:
        """Return what a kernel is told, of the buffer's keys and values."""
        return Ahead(self.q_rows, k[self.key_rows], v[self.key_rows], self.segments)


@dataclass(frozen=True, slots=True)
class GatherRoute:
    """A `GatherRoute` brings all keys in one exchange.

    Args:
        send_rows: rows that leave, by receiver; int64.
        num_sent, num_received: rows for, and from, each rank of the group.
        meeting: keys are this rank's rows, then those received.
        ahead: of the same buffer, keys after some of the queries; None: these meet none.
    """

    send_rows: torch.Tensor
    num_sent: tuple[int, ...]
    num_received: tuple[int, ...]
    meeting: Meeting
    ahead: MeetingAhead | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """A round is one step of a ring: rows to the rank `number` places on, rows from the rank as many places back.

    In a ring the rows are keys, in a token ring queries. A rank may have nothing to do in a round; it still knows of it
    (see `RingRoute`).

    Args:
        number: from 1 to degree - 1.
        send_to, receive_from: positions in the group.
        send_rows: None sends nothing.
        num_received: 0 receives nothing.
        meeting: keys, or queries, are the rows received; None with nothing received.
    """

    number: int
    send_to: int
    receive_from: int
    send_rows: torch.Tensor | None
    num_received: int
    meeting: Meeting | None

    @property
    def is_idle(self) -> bool:
        """Return whether this rank neither sends nor receives."""
        return self.send_rows is None and not self.num_received


@dataclass(frozen=True, slots=True)
class RingRoute:
    """A `RingRoute` is what this rank holds itself, and all rounds of the group by number, idle ones too.

    On a GPU the messages of a group leave in one stream: each waits until the other side has come to it. All ranks have
    one order for their messages, that of the rounds' numbers, whichever rounds each of them is idle in. So no ranks can
    wait for each other in a circle: who stands at a message waits for a rank that stands at an earlier one, and the
    rank that stands at the earliest of all would have nobody to wait for.
    """

    local: Meeting
    rounds: tuple[Round, ...]


def gather_route(
    layout: Layout, me: int, window: int | None, device: torch.device, mutual: Mutual = NOWHERE
) -> GatherRoute:
    """Route each key to the queries that meet it, in a layer whose queries see `window` tokens (None: all before).

    Args:
        layout: who holds what.
        me: this rank's position.
        window: of the layer.
        device: where row numbers go.
        mutual: where queries meet keys after them, too.
    """
    others = [rank for rank in range(layout.degree) if rank != me]
    sent = {rank: needed(layout, rank, me, window, mutual) for rank in others}
    received = {rank: needed(layout, me, rank, window, mutual) for rank in others}
    mine = Rows(layout.spans[me])
    buffer = Rows([*layout.spans[me], *(span for rank in others for span in received[rank])])
    return GatherRoute(
        send_rows=row_index((rows for rank in others for rows in mine.of(sent[rank])), device),
        num_sent=tuple(_num_tokens(sent.get(rank, ())) for rank in range(layout.degree)),
        num_received=tuple(_num_tokens(received.get(rank, ())) for rank in range(layout.degree)),
        meeting=_causal_meeting(layout.spans[me], buffer, window, device),
        ahead=meeting_ahead(layout.spans[me], buffer, mutual, device),
    )


def ring_route(layout: Layout, me: int, device: torch.device) -> RingRoute:
    """Route keys in rounds, for a layer whose queries see all before them."""
    spans = layout.spans[me]

    def travel(source: int, to: int) -> tuple[Span, ...]:
        return needed(layout, to, source)

    return _in_rounds(layout, me, device, travel, lambda keys: _full_meeting(spans, keys, device))


def token_ring_route(layout: Layout, me: int, device: torch.device) -> RingRoute:
    """Route queries in rounds to the keys that they meet, for a layer whose queries see all before them."""
    spans = layout.spans[me]

    def travel(source: int, to: int) -> tuple[Span, ...]:
        return asking(layout, source, to)

    return _in_rounds(layout, me, device, travel, lambda queries: _full_meeting(queries, spans, device))


def _in_rounds(
    layout: Layout,
    me: int,
    device: torch.device,
    travel: Callable[[int, int], tuple[Span, ...]],
    meet: Callable[[tuple[Span, ...]], Meeting],
) -> RingRoute:
    """Route rows from each rank to each other, one rank further in every round.

    Args:
        layout: who holds what.
        me: this rank's position.
        device: where row numbers go.
        travel: (sender, receiver) -> what the one sends to the other.
        meet: what arrived -> how it meets what this rank has.
    """
    mine = Rows(layout.spans[me])
    rounds: list[Round] = []
    for number in range(1, layout.degree):
        to, source = (me + number) % layout.degree, (me - number) % layout.degree
        sent, received = travel(me, to), travel(source, me)
        rows = row_index(mine.of(sent), device) if sent else None
        rounds.append(Round(number, to, source, rows, _num_tokens(received), meet(received) if received else None))
    # at first with one's own keys only: the others come, or are come to, in rounds
    return RingRoute(_causal_meeting(layout.spans[me], mine, None, device, whole=False), tuple(rounds))


class Rows:
    """`Rows` know where the tokens of some spans lie in a buffer that holds the spans one after the other."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._by_sample: dict[int, list[tuple[int, int, int]]] = {}
        self.num_rows = 0
        for span in spans:
            self._by_sample.setdefault(span.sample, []).append((span.start, span.end, self.num_rows))
            self.num_rows += span.num_tokens
        for spans_of_sample in self._by_sample.values():
            spans_of_sample.sort()

    def within(self, sample: int, first: int, end: int) -> list[range]:
        """Return the rows of tokens `first` to `end` of a sample, in their order, without those held elsewhere."""
        return [
            range(row + max(first, start) - start, row + min(end, stop) - start)
            for start, stop, row in self._by_sample.get(sample, ())
            if max(first, start) < min(end, stop)
        ]

    def of(self, spans: Iterable[Span]) -> list[range]:
        """Return the rows of some spans, in their order."""
        return [rows for span in spans for rows in self.within(span.sample, span.start, span.end)]


def meeting_ahead(spans: Sequence[Span], buffer: Rows, mutual: Mutual, device: torch.device) -> MeetingAhead | None:
    """Let each query of a stretch meet the keys after it, up to the stretch's end; None where there are no such keys.

    Both come from the stretch's end to its beginning. Of a span's queries s .. e - 1, and keys s + 1 .. b - 1, where b
    is the stretch's end, the last query, s, then meets all keys, the one before it all but the last, and so on.

    Args:
        spans: of this rank's queries, in memory order.
        buffer: of keys; those of whole stretches, behind the first query of each.
        mutual: the stretches.
        device: where row numbers go.
    """
    mine = Rows(spans)
    pairs: list[tuple[list[range], list[range]]] = []
    for span in spans:
        for begin, end in mutual.get(span.sample, ()):
            first, stop = max(span.start, begin), min(span.end, end - 1)  # the last token of all has none after it
            if first < stop:
                pairs.append((mine.within(span.sample, first, stop), buffer.within(span.sample, first + 1, end)))
                assert sum(map(len, pairs[-1][1])) == end - first - 1, "a key that is needed has not been sent"
    if not pairs:
        return None
    (queries, keys), host = zip(*pairs, strict=True), torch.device("cpu")
    q_rows, k_rows = ([row_index(rows, host).flip(0) for rows in of_runs] for of_runs in (queries, keys))
    segments = Segments.of([len(rows) for rows in q_rows], [len(rows) for rows in k_rows], device)
    return MeetingAhead(torch.cat(q_rows).to(device), torch.cat(k_rows).to(device), segments)


def _causal_meeting(
    spans: Sequence[Span], buffer: Rows, window: int | None, device: torch.device, whole: bool = True
) -> Meeting:
    """Let each span of queries meet the keys before it that are in the buffer, and itself.

    The keys of a span come in the order of tokens and end with its own. So the last query meets all of them, as
    `Segments.causal` has it, whatever lies elsewhere.

    Args:
        whole: the buffer holds everything that the queries meet; else only what this rank has itself.
    """
    keys: list[list[range]] = []
    for span in spans:
        first = 0 if window is None else max(0, span.start - window + 1)
        keys.append(buffer.within(span.sample, first, span.end))
        assert not whole or sum(map(len, keys[-1])) == span.end - first, "a key that is needed has not been sent"
    flat = [rows for of_span in keys for rows in of_span]
    is_in_order = joined(flat) == [range(buffer.num_rows)]  # then no copy is made of the buffer, in any layer
    segments = Segments.of([span.num_tokens for span in spans], [sum(map(len, of_span)) for of_span in keys], device)
    return Meeting(None if is_in_order else row_index(flat, device), segments)


def _full_meeting(spans: Sequence[Span], keys_at: Sequence[Span], device: torch.device) -> Meeting:
    """Let each span of queries meet those of another rank's keys that lie before it.

    Spans do not overlap, so another rank's keys lie before all queries of a span or after all: no mask is needed.
    """
    mine, theirs = Rows(spans), Rows(keys_at)
    candidates = [(span, theirs.within(span.sample, 0, span.start)) for span in spans]
    pairs = [(span, keys) for span, keys in candidates if keys]  # kernels want no empty runs
    q_rows, key_rows = mine.of(span for span, _ in pairs), [rows for _, keys in pairs for rows in keys]
    segments = Segments.of(
        [span.num_tokens for span, _ in pairs], [sum(map(len, keys)) for _, keys in pairs], device, causal=False
    )
    return Meeting(
        None if joined(key_rows) == [range(theirs.num_rows)] else row_index(key_rows, device),
        segments,
        None if joined(q_rows) == [range(mine.num_rows)] else row_index(q_rows, device),
    )


def _num_tokens(spans: Iterable[Span]) -> int:
    return sum(span.num_tokens for span in spans)


def joined(ranges: Iterable[range]) -> list[range]:
    """Return the same rows in as few ranges as can be."""
    found: list[range] = []
    for rows in ranges:
        if found and found[-1].stop == rows.start:
            found[-1] = range(found[-1].start, rows.stop)
        else:
            found.append(rows)
    return found


def row_index(ranges: Iterable[range], device: torch.device) -> torch.Tensor:
    """Return the numbers of some rows, int64."""
    parts = [torch.arange(rows.start, rows.stop) for rows in joined(ranges)]
    return torch.cat(parts or [torch.zeros(0, dtype=torch.int64)]).to(device)
