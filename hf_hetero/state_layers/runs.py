"""Runs are the tokens of samples that a mixer goes over, one sample after the other, and what travels for it.

A mixer sees the tokens before its own, as causal attention does, so what a rank must fetch is what `gather` fetches of
keys: for each of its spans the tokens of the sample before it, or, where a mixer looks back a few tokens only, these.
A sample that one rank holds whole stays where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from hf_hetero.attention.routes import Rows, joined, row_index
from hf_hetero.layout import Layout, Span, needed


@dataclass(frozen=True, slots=True)
class Runs:
    """`Runs` are what the mixers of one rank go over.

    Args:
        send_rows: this rank's rows that leave, by receiver; int64.
        num_sent, num_received: rows for, and from, each rank of the group.
        order: rows of the buffer, which is this rank's rows, those received, by rank, and those that stand in; in the
            order of the runs. None: as they are.
        lengths: tokens of each run; none of them is empty.
        kept: outputs of this rank's own rows among those of all runs; None: all of them, as they are.
    """

    send_rows: torch.Tensor
    num_sent: tuple[int, ...]
    num_received: tuple[int, ...]
    order: torch.Tensor | None
    lengths: tuple[int, ...]
    kept: torch.Tensor | None


def runs_of(layout: Layout, me: int, window: int | None, stand_ins: int, device: torch.device) -> Runs:
    """Find the runs of a rank.

    Args:
        layout: of the group.
        me: position of the rank in the group.
        window: tokens that an output of the mixer sees, itself included; None: all before it.
        stand_ins: rows after this rank's tokens that belong to no sample; they are a run of their own.
        device: where row numbers go.
    """
    others = [rank for rank in range(layout.degree) if rank != me]
    sent = {rank: needed(layout, rank, me, window) for rank in others}
    received = [needed(layout, me, rank, window) if rank != me else () for rank in range(layout.degree)]
    own = layout.spans[me]
    mine = Rows(own)
    buffer = Rows([*own, *(span for spans in received for span in spans)])
    parts = [Span(span.sample, _first(span, window), span.end) for span in own]
    parts = _whole_prefixes(parts) if window is None else parts
    ranges = [buffer.within(part.sample, part.start, part.end) for part in parts]
    lengths = [part.num_tokens for part in parts]
    assert [sum(map(len, of_part)) for of_part in ranges] == lengths, "a token that is needed has not been sent"
    rows = [rows for of_part in ranges for rows in of_part]
    kept = _own_outputs(own, parts)
    if stand_ins:
        rows.append(range(buffer.num_rows, buffer.num_rows + stand_ins))
        kept.append(range(sum(lengths), sum(lengths) + stand_ins))
        lengths.append(stand_ins)
    return Runs(
        send_rows=row_index((rows for rank in others for rows in mine.of(sent[rank])), device),
        num_sent=tuple(sum(span.num_tokens for span in sent.get(rank, ())) for rank in range(layout.degree)),
        num_received=tuple(sum(span.num_tokens for span in spans) for spans in received),
        order=None if _is_all(rows, buffer.num_rows + stand_ins) else row_index(rows, device),
        lengths=tuple(lengths),
        kept=None if _is_all(kept, sum(lengths)) else row_index(kept, device),
    )


def _first(span: Span, window: int | None) -> int:
    return 0 if window is None else max(0, span.start - window + 1)


def _whole_prefixes(parts: Sequence[Span]) -> list[Span]:
    """Return one run a sample, up to the last token that is needed: several spans of one are gone over once."""
    ends: dict[int, int] = {}
    for part in parts:
        ends[part.sample] = max(part.end, ends.get(part.sample, 0))
    return [Span(sample, 0, end) for sample, end in ends.items()]


def _own_outputs(own: Sequence[Span], parts: Sequence[Span]) -> list[range]:
    """Find the outputs of this rank's own tokens, in their order, among those of all runs."""
    starts = list(accumulate((part.num_tokens for part in parts), initial=0))
    runs_of_sample: dict[int, list[int]] = {}
    for number, part in enumerate(parts):
        runs_of_sample.setdefault(part.sample, []).append(number)
    found: list[range] = []
    for span in own:
        # the run of a span ends with it, or later, where one run serves several spans of a sample
        run = next(n for n in runs_of_sample[span.sample] if parts[n].end >= span.end)
        at = starts[run] + span.start - parts[run].start
        found.append(range(at, at + span.num_tokens))
    return found


def _is_all(ranges: Sequence[range], num_rows: int) -> bool:
    """Tell whether these are all rows, in order: then no copy is made."""
    return joined(ranges) == [range(num_rows)]
