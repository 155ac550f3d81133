"""Ranks share a sample's mixer by heads: each goes over all of its tokens, with a part of the heads.

The hidden states of samples that are cut go to all ranks of the group, and the parts' outputs back to the rank that
holds the token, where they are added up, always in the order of the ranks. Samples that are whole on a rank stay there.
So the work of a cut sample is divided by the degree, whatever its ranks hold of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_hetero.attention.context import Place
from hf_hetero.attention.routes import Rows, row_index
from hf_hetero.attention.traffic import all_to_all
from hf_hetero.layout import Layout, Span

Mix = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
"""Rows of samples, shape (n, hidden), and the tokens of each -> outputs, (n, hidden)."""


@dataclass(frozen=True, slots=True)
class HeadRuns:
    """`HeadRuns` are the samples of a pack, told apart by whether ranks share them.

    Args:
        whole_rows: this rank's rows of samples that are whole here, and those that stand in.
        whole_lengths: tokens of each.
        cut_rows: this rank's rows of samples that are cut.
        num_rows: of such, for each rank of the group.
        order: rows of all ranks, one rank after the other, in the order of samples.
        back: the inverse.
        lengths: tokens of each cut sample.
        merged: this rank's rows, in their order, among outputs of whole samples and then of cut ones.
    """

    whole_rows: torch.Tensor
    whole_lengths: tuple[int, ...]
    cut_rows: torch.Tensor
    num_rows: tuple[int, ...]
    order: torch.Tensor
    back: torch.Tensor
    lengths: tuple[int, ...]
    merged: torch.Tensor


def head_runs_of(layout: Layout, me: int, stand_ins: int, device: torch.device) -> HeadRuns:
    """Tell the samples of a pack apart.

    Args:
        layout: of the group.
        me: position of this rank in it.
        stand_ins: rows after this rank's tokens that belong to no sample.
        device: where row numbers go.
    """

    def is_cut(span: Span) -> bool:
        return span.num_tokens < layout.lengths[span.sample]

    whole, cut, lengths, start = list[range](), list[range](), list[int](), 0
    for span in layout.spans[me]:
        (cut if is_cut(span) else whole).append(range(start, start + span.num_tokens))
        if not is_cut(span):
            lengths.append(span.num_tokens)
        start += span.num_tokens
    if stand_ins:
        whole.append(range(start, start + stand_ins))
        lengths.append(stand_ins)
    of_ranks = [[span for span in spans if is_cut(span)] for spans in layout.spans]
    rows = Rows([span for spans in of_ranks for span in spans])
    samples = sorted({span.sample for spans in of_ranks for span in spans})
    order = row_index((part for s in samples for part in rows.within(s, 0, layout.lengths[s])), device)
    whole_rows, cut_rows = row_index(whole, device), row_index(cut, device)
    return HeadRuns(
        whole_rows=whole_rows,
        whole_lengths=tuple(lengths),
        cut_rows=cut_rows,
        num_rows=tuple(sum(span.num_tokens for span in spans) for spans in of_ranks),
        order=order,
        back=order.argsort(),
        lengths=tuple(layout.lengths[sample] for sample in samples),
        merged=torch.cat([whole_rows, cut_rows]).argsort(),
    )


def mixed_by_heads(hidden: torch.Tensor, runs: HeadRuns, place: Place, whole: Mix, part: Mix) -> torch.Tensor:
    """Compute a mixer of this rank's tokens with the other ranks of the group; shape (n, hidden) in and out.

    Args:
        hidden: of this rank's tokens, and of those that stand in.
        runs: the samples.
        place: the layer.
        whole: the mixer.
        part: this rank's part of it.

    Raises:
        CollectiveFailed: an exchange failed or waited longer than the group's timeout.
    """
    width, me = hidden.shape[1], place.context.group_rank
    num = runs.num_rows[me]
    mine = hidden[runs.cut_rows]
    to_each = [0 if rank == me else width * num for rank in range(len(runs.num_rows))]
    of_each = [0 if rank == me else width * rows for rank, rows in enumerate(runs.num_rows)]
    copies = mine.repeat(len(runs.num_rows) - 1, 1).reshape(-1)
    arrived = all_to_all(copies, to_each, of_each, place.context.peers, "all-to-all of hidden states", place).view(
        -1, width
    )
    before = sum(runs.num_rows[:me])
    rows = torch.cat([arrived[:before], mine, arrived[before:]])[runs.order]
    out = part(rows, runs.lengths)[runs.back]
    sent = torch.cat([out[:before], out[before + num :]]).reshape(-1)
    arrived = all_to_all(sent, of_each, to_each, place.context.peers, "all-to-all of mixed states", place)
    arrived = arrived.view(len(runs.num_rows) - 1, num, width)
    total = _in_order([*arrived[:me], out[before : before + num], *arrived[me:]])
    if runs.whole_lengths:
        total = torch.cat([whole(hidden[runs.whole_rows], runs.whole_lengths), total])
    return total[runs.merged]


def _in_order(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add up what ranks have computed, in their order, so that all of them get the same to the last bit."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class NormOverRanks(torch.nn.Module):
    """`NormOverRanks` is the gated norm of a part, over the channels of all parts: their squares are added up.

    Args:
        norm: of transformers, with this rank's weights; its gate comes before the norm.
        place: the layer.
    """

    def __init__(self, norm: Any, place: Place) -> None:
        super().__init__()
        self._norm, self._place = norm, place

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Return the normed states; both of shape (1, n, channels of this part)."""
        dtype = hidden_states.dtype
        x = hidden_states.to(torch.float32) * torch.nn.functional.silu(gate.to(torch.float32))
        squares, peers = x.pow(2).sum(-1).flatten(), self._place.context.peers
        others, num, me = len(peers.ranks) - 1, len(squares), peers.me
        splits = [0 if rank == me else num for rank in range(others + 1)]
        arrived = all_to_all(squares.repeat(others), splits, splits, peers, "all-to-all of squares", self._place)
        of_others = arrived.view(others, num)
        mean = _in_order([*of_others[:me], squares, *of_others[me:]]) / self._norm.group_size
        x = x * torch.rsqrt(mean + self._norm.variance_epsilon).view(1, num, 1)
        return self._norm.weight * x.to(dtype)
