"""A ring takes keys and values from one rank after the other, the next under way while these are computed with.

Ring Attention (arXiv:2310.01889) in the zigzag layout, with three changes. Only keys that the receiver's queries must
meet travel. They come straight from the rank that holds them instead of through all ranks between, and their gradients
go straight back; so nobody waits for a chain, and each row travels once. And the parts are merged by log-sum-exp in
fp32 or wider (in fp64, exactly). A rank holds the keys of two others at a time, never those of the whole group; heads
need not divide by the degree.

Layers with a sliding window need only the window before each cut: they gather it at once (`gather`). So do layers in
which tokens of an image look at each other, in packs that have some.

Why that is exact.
    Every rank meets every other's keys once. In round n = 1 .. d - 1, rank r receives from rank r - n and sends to rank
    r + n, modulo d. For a fixed r, r - n runs through all other ranks, each once; its own keys come first, without a
    round. And where r sends to r + n, that rank receives from (r + n) - n = r: no message lacks its other half. Which
    of the keys a query meets depends on positions in the sample alone (`layout.needed`), never on the round.

    The order of the rounds changes nothing but rounding, because outputs over disjoint keys merge exactly
    (`kernels.contract.merge`), and merging is associative.

    Backward needs no order either. With the merged output and log-sum-exp, the gradients of some of the keys depend on
    no other key (`kernels.contract`), so each round adds its part.

Why all ranks finish a round together. `zigzag` cuts a long sample into 2d pieces of c tokens, of which rank r has r
and 2d - 1 - r. With the keys of rank j < r, both pieces of queries come after piece j and before piece 2d - 1 - j: they
meet 2 c^2 pairs. With those of rank j > r, the late piece of queries comes after both pieces of keys, the early one
before both: 2 c^2 pairs again. So every rank has as much to compute in every round as every other rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_hetero.attention.context import Peers, Place
from hf_hetero.attention.gather import gather
from hf_hetero.attention.kernels.contract import Kernel, Scores, merge, sinks_gradient, with_sinks
from hf_hetero.attention.routes import Meeting, RingRoute, Round, ring_route
from hf_hetero.attention.traffic import Shift
from hf_hetero.errors import UnsupportedModel

MERGING = frozenset({"ring", "ulysses_ring", "token_ring"})
"""Methods that merge parts, which takes a kernel that tells its log-sum-exp."""


def ring(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, place: Place) -> torch.Tensor:
    """Compute attention of a pack that is spread over a group in any layout; as `gather`, with less memory."""
    if scores.window is not None or scores.mutual:
        return gather(q, k, v, scores, place)
    context = place.context
    route: RingRoute = context.shared("ring", lambda: ring_route(context.layout, context.group_rank, context.device))
    return attend_in_rounds(q, k, v, scores, place, context.peers, route)


def attend_in_rounds(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scores: Scores,
    place: Place,
    peers: Peers,
    route: RingRoute,
) -> torch.Tensor:
    """Compute attention along a route.

    Args:
        q, k, v: this rank's rows, as the route counts them; shapes (t, H, D), (t, Hk, D) and (t, Hk, Dv).
        scores: scaling and features; no window.
        place: the layer.
        peers: the ranks of the route.
        route: who meets whom, when.

    Returns:
        Shape (t, H, Dv).

    Raises:
        CollectiveFailed: a rank is gone, or waited longer than the group's timeout.
        UnsupportedModel: the kernel gives no log-sum-exp to merge by, or lacks a feature.
    """
    require_parts(place.context.kernel, scores)
    out: Any = _Ring.apply(q, k, v, scores.sinks, scores.without_sinks(), place, peers, route)
    return out


def require_parts(kernel: Kernel, scores: Scores) -> None:
    """Refuse a kernel whose outputs over some of the keys cannot be merged.

    It is asked before any message leaves. All ranks have this kernel, so all refuse, and none waits for another.

    Raises:
        UnsupportedModel: the kernel gives no log-sum-exp to merge by, or lacks a feature.
    """
    kernel.require(scores.features)
    if not kernel.has_lse:
        raise UnsupportedModel(
            f"Kernel {kernel.name!r} gives no log-sum-exp, so a ring cannot merge its parts. Leave "
            f"{', '.join(sorted(MERGING))} out of HeteroConfig.methods, or let hf_hetero choose the kernel."
        )


class _Ring(torch.autograd.Function):
    """`_Ring` merges outputs in forward; backward computes each part against them, and sends gradients home."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        scores: Scores,
        place: Place,
        peers: Peers,
        route: RingRoute,
    ) -> torch.Tensor:
        rounds = _Rounds(place, peers, route, "ring")
        out, lse = place.once("ring", lambda: rounds.attend(q, k, v, sinks, scores))
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.call = scores, _Rounds(place, peers, route, "ring in backward")
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        scores, rounds = ctx.call
        grad = grad_outputs[0].contiguous()
        grads = rounds.gradients(grad, q, k, v, out, lse, scores)
        return *grads, sinks_gradient(grad, out, lse, sinks), None, None, None, None


class _Rounds:
    """`_Rounds` are one pass along a route, forward or backward."""

    def __init__(self, place: Place, peers: Peers, route: RingRoute, operation: str) -> None:
        self._kernel: Kernel = place.context.kernel
        self._place, self._peers, self._route, self._operation = place, peers, route, operation

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output in q's type, and the log-sum-exp."""
        assert self._kernel.forward is not None
        rows = torch.cat([k, v], dim=2)
        # one message a round, in the order of the rounds: to pass over idle ones sets the next under way earlier
        turns = [turn for turn in self._route.rounds if not turn.is_idle]
        under_way = self._start(turns, 0, rows)
        out, lse = self._meet(q, rows, self._route.local, k.shape[2], scores)
        out = out.to(lse.dtype)  # merged in the wider type, or each round would round once more
        for index, turn in enumerate(turns):
            # the next keys set out when these are there, and before these are computed with: two rounds' keys at most
            # are held, and the way of the next ones costs no time of its own
            arrived, under_way = _arrived(under_way), self._start(turns, index + 1, rows)
            if turn.meeting is None or arrived is None:
                continue
            part, part_lse = self._meet(q, arrived, turn.meeting, k.shape[2], scores)
            of = slice(None) if turn.meeting.q_rows is None else turn.meeting.q_rows
            out[of], lse[of] = merge(out[of], lse[of], part.to(lse.dtype), part_lse)
        # a sink is one key, so it joins once, after the last round, and not with each rank's keys
        out, lse = with_sinks(out, lse, sinks)
        return out.to(q.dtype), lse

    def _meet(
        self, q: torch.Tensor, rows: torch.Tensor, meeting: Meeting, key_dim: int, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the queries of a meeting get from its keys: output and log-sum-exp."""
        assert self._kernel.forward is not None
        if not q.numel():  # a rank without queries still hands on the keys that it holds
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
        """Return dq, dk, dv of this rank's rows, summed in fp32 or wider.

        The gradients of round n leave after the keys of round n + 1 and before those of round n + 2, on every rank,
        whatever rounds it is idle in: one order of messages, so no circle of waiting ranks (`routes.RingRoute`).
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
            meeting.add_to(into, torch.cat([dk, dv[..., : v.shape[2]]], dim=2))

        turns = self._route.rounds  # idle ones, too: the place of gradients among the keys is counted in rounds
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
            if len(going_home) > 1:  # one stays under way while the next round is computed
                _add_home(*going_home.pop(0), grad_rows)
        for turn, shift in going_home:
            _add_home(turn, shift, grad_rows)
        grad_k, grad_v = grad_rows.split([key_dim, v.shape[2]], dim=2)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)

    def _start(self, turns: Sequence[Round], index: int, rows: torch.Tensor) -> Shift | None:
        """Set the keys and values of a round under way; return None after the last one."""
        if index >= len(turns):
            return None
        turn = turns[index]
        outgoing = None if turn.send_rows is None else rows[turn.send_rows]
        incoming = rows.new_empty(turn.num_received, *rows.shape[1:]) if turn.num_received else None
        return self._shift(turn, outgoing, incoming, turn.send_to, turn.receive_from, 2 * turn.number)

    def _send_home(self, turn: Round, part: torch.Tensor | None, rows: torch.Tensor) -> Shift:
        """Send the gradients of the keys that came in a round back, and expect those of the keys that left."""
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
        # gloo matches messages of two ranks by the tag, which no two messages of a pass from one to the other share;
        # NCCL matches them by their order, which is that of the rounds on both sides
        operation = f"{self._operation}, round {turn.number}"
        return Shift(outgoing, incoming, send_to, receive_from, tag, self._peers, operation, self._place)


def _keys_and_values(rows: torch.Tensor, meeting: Meeting, key_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = meeting.keys_of(rows)
    return rows[..., :key_dim], rows[..., key_dim:]


def _arrived(shift: Shift | None) -> torch.Tensor | None:
    return None if shift is None else shift.wait()


def _add_home(turn: Round, shift: Shift, grad_rows: torch.Tensor) -> None:
    arrived = shift.wait()
    if arrived is not None and turn.send_rows is not None:
        grad_rows.index_add_(0, turn.send_rows, arrived.to(grad_rows.dtype))
