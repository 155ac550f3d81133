"""Ring: keys and values come from one rank after the other, the next ones under way while these are computed with.

Ring Attention (arXiv:2310.01889) in the zigzag layout, with three changes. Only keys that the receiver's queries must
meet travel. They come straight from the rank that holds them instead of through all ranks between, and their gradients
go straight back; so nobody waits for a chain, and each row travels once. And the parts are merged by log-sum-exp in
fp32 or wider (in fp64, exactly). A rank holds the keys of two others at a time, never those of the whole group; heads
need not divide by the degree.

Layers with a sliding window need only the window before each cut: they gather it at once (`gather`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.contract import Kernel, Scores, merge, sinks_gradient, with_sinks
from hf_hetero.attention.gather import gather
from hf_hetero.attention.routes import Meeting, RingRoute, Round, ring_route
from hf_hetero.attention.traffic import Shift
from hf_hetero.errors import UnsupportedModel


def ring(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: AttentionContext, scores: Scores, layer: int
) -> torch.Tensor:
    """Exact causal attention of a pack that is spread over a group in any layout; as `gather`, with less memory."""
    if scores.window is not None:
        return gather(q, k, v, context, scores, layer)
    route: RingRoute = context.made("ring", lambda: ring_route(context.layout, context.group_rank, context.device))
    return attend_in_rounds(q, k, v, context, route, context.ranks, scores, layer)


def attend_in_rounds(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    context: AttentionContext,
    route: RingRoute,
    peers: tuple[int, ...],
    scores: Scores,
    layer: int,
) -> torch.Tensor:
    """Attention along a route.

    Args:
        q, k, v: this rank's rows, as the route counts them.
        context: process group and kernel.
        route: who meets whom, when.
        peers: global rank of each position in the route.
        scores: scaling and features; no window.
        layer: for messages.

    Returns:
        Shape (rows of q, num_heads, size of a value).

    Raises:
        CollectiveFailed: a rank is gone, or waited longer than the group's timeout.
        UnsupportedModel: the kernel gives no log-sum-exp to merge by, or lacks a feature.
    """
    kernel = context.kernel
    kernel.require(scores.features)
    if not kernel.has_lse:
        raise UnsupportedModel(
            f"Kernel {kernel.name!r} gives no log-sum-exp, so a ring cannot merge its parts. "
            'Leave "ring" and "ulysses_ring" out of HeteroConfig.methods, or let hf_hetero choose the kernel.'
        )
    out: Any = _Ring.apply(q, k, v, scores.sinks, context, route, peers, scores.without_sinks(), layer)
    return out


class _Ring(torch.autograd.Function):
    """Forward merges outputs; backward computes each part against the merged output, and sends gradients home."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        context: AttentionContext,
        route: RingRoute,
        peers: tuple[int, ...],
        scores: Scores,
        layer: int,
    ) -> torch.Tensor:
        rounds = _Rounds(context, route, peers, "ring", layer)
        out, lse = context.once(layer, "ring", lambda: rounds.attend(q, k, v, sinks, scores))
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.call = context, route, peers, scores, layer
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        context, route, peers, scores, layer = ctx.call
        grad = grad_outputs[0].contiguous()
        grads = _Rounds(context, route, peers, "ring in backward", layer).gradients(grad, q, k, v, out, lse, scores)
        return *grads, sinks_gradient(grad, out, lse, sinks), None, None, None, None, None


class _Rounds:
    """One pass along a route: what is under way, and what it is for."""

    def __init__(
        self, context: AttentionContext, route: RingRoute, peers: tuple[int, ...], operation: str, layer: int
    ) -> None:
        self._kernel: Kernel = context.kernel
        self._group, self._route, self._peers = context.process_group, route, peers
        self._operation, self._where, self._waits = operation, context.where(layer), context.waits

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output in q's type, and log-sum-exp."""
        assert self._kernel.forward is not None
        rows = torch.cat([k, v], dim=2)
        # one message a round, in the order of the rounds: to pass over idle ones sets the next under way earlier
        turns = [turn for turn in self._route.rounds if not turn.is_idle]
        under_way = self._start(turns, 0, rows)
        out, lse = self._meet(q, rows, self._route.local, k.shape[2], scores)
        out = out.to(lse.dtype)
        for index, turn in enumerate(turns):
            arrived, under_way = _arrived(under_way), self._start(turns, index + 1, rows)
            if turn.meeting is None or arrived is None:
                continue
            part, part_lse = self._meet(q, arrived, turn.meeting, k.shape[2], scores)
            of = slice(None) if turn.meeting.q_rows is None else turn.meeting.q_rows
            out[of], lse[of] = merge(out[of], lse[of], part.to(lse.dtype), part_lse)
        out, lse = with_sinks(out, lse, sinks)
        return out.to(q.dtype), lse

    def _meet(
        self, q: torch.Tensor, rows: torch.Tensor, meeting: Meeting, key_dim: int, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._kernel.forward is not None
        if not q.numel():
            return q.new_empty(*q.shape[:2], rows.shape[2] - key_dim), q.new_empty(q.shape[:2], dtype=torch.float32)
        q = q if meeting.q_rows is None else q[meeting.q_rows]
        keys, values = _keys_and_values(rows, meeting, key_dim)
        (padded,) = self._kernel.padded([values], key_dim)
        out, lse = self._kernel.forward(q, keys, padded, meeting.segments, scores)
        return out[..., : values.shape[2]], lse

    def gradients(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dq, dk, dv of this rank's rows, summed in fp32 or wider.

        The gradients of round n leave after the keys of round n + 1 and before those of round n + 2, on every rank,
        whatever rounds it is idle in. So all ranks have one order of messages, and no two can wait for each other.
        """
        key_dim, wide = k.shape[2], torch.promote_types(q.dtype, torch.float32)
        rows = torch.cat([k, v], dim=2)
        grad_q, grad_rows = torch.zeros_like(q, dtype=wide), torch.zeros_like(rows, dtype=wide)

        def meet(keys: torch.Tensor, meeting: Meeting, into: torch.Tensor) -> None:
            if not q.numel():
                return
            assert self._kernel.backward is not None
            of = slice(None) if meeting.q_rows is None else meeting.q_rows
            block_k, block_v = _keys_and_values(keys, meeting, key_dim)
            block_grad, block_v, block_out = self._kernel.padded([grad[of], block_v, out[of]], key_dim)
            queries = (block_grad, q[of], block_k, block_v, block_out, lse[of])
            dq, dk, dv = self._kernel.backward(*queries, meeting.segments, scores)
            grad_q[of] += dq
            found = torch.cat([dk, dv[..., : v.shape[2]]], dim=2).to(into.dtype)
            if meeting.key_rows is None:
                into += found
            else:
                into.index_add_(0, meeting.key_rows, found)

        turns = self._route.rounds
        under_way = self._start(turns, 0, rows)
        meet(rows, self._route.local, grad_rows)
        going_home: list[tuple[Round, Shift]] = []
        for index, turn in enumerate(turns):
            arrived, under_way = _arrived(under_way), self._start(turns, index + 1, rows)
            part: torch.Tensor | None = None
            if turn.meeting is not None and arrived is not None:
                part = torch.zeros_like(arrived, dtype=wide)
                meet(arrived, turn.meeting, part)
            going_home.append((turn, self._send_home(turn, part, rows)))
            if len(going_home) > 1:
                _add_home(*going_home.pop(0), grad_rows)
        for turn, shift in going_home:
            _add_home(turn, shift, grad_rows)
        grad_k, grad_v = grad_rows.split([key_dim, v.shape[2]], dim=2)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)

    def _start(self, turns: Sequence[Round], index: int, rows: torch.Tensor) -> Shift | None:
        """Set the keys and values of a round under way; None after the last one."""
        if index >= len(turns):
            return None
        turn = turns[index]
        outgoing = None if turn.send_rows is None else rows[turn.send_rows]
        incoming = rows.new_empty(turn.num_received, *rows.shape[1:]) if turn.num_received else None
        return self._shift(turn, outgoing, incoming, turn.send_to, turn.receive_from, 2 * turn.number)

    def _send_home(self, turn: Round, part: torch.Tensor | None, rows: torch.Tensor) -> Shift:
        """Gradients of the keys that came in a round go back; those of the keys that left come home."""
        outgoing = None if part is None else part.to(rows.dtype)
        incoming = None if turn.send_rows is None else rows.new_empty(len(turn.send_rows), *rows.shape[1:])
        return self._shift(turn, outgoing, incoming, turn.receive_from, turn.send_to, 2 * turn.number + 1)

    def _shift(
        self,
        turn: Round,
        outgoing: torch.Tensor | None,
        incoming: torch.Tensor | None,
        send_to: int,
        receive_from: int,
        tag: int,
    ) -> Shift:
        assert self._group is not None
        name = f"{self._operation}, round {turn.number}"
        to, source = self._peers[send_to], self._peers[receive_from]
        return Shift(outgoing, incoming, to, source, tag, self._group, name, self._where, self._waits)


def _keys_and_values(rows: torch.Tensor, meeting: Meeting, key_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = rows if meeting.key_rows is None else rows[meeting.key_rows]
    return rows[..., :key_dim], rows[..., key_dim:]


def _arrived(shift: Shift | None) -> torch.Tensor | None:
    return None if shift is None else shift.wait()


def _add_home(turn: Round, shift: Shift, grad_rows: torch.Tensor) -> None:
    arrived = shift.wait()
    if arrived is not None and turn.send_rows is not None:
        grad_rows.index_add_(0, turn.send_rows, arrived.to(grad_rows.dtype))
