"""In a token ring keys and values stay, and queries go from rank to rank; what each of them gets comes straight home.

TokenRing (arXiv:2412.20501), made exact for packs in any layout, and with a gradient. In round n = 1 .. d - 1, rank r
lends its queries to rank r + n, modulo d, and computes with those of rank r - n. Only queries that meet a key there
leave. Their outputs and log-sum-exps go back to whom they belong to, in the same messages as the queries of the round
after next, so that links carry both ways at once.

Why that is exact.
    As in `ring`: every pair of ranks meets once, outputs over disjoint keys merge exactly (`kernels.contract.merge`),
    and with the merged log-sum-exp the gradients over some keys depend on no other key. Only who computes a part
    differs: the holder of the keys, not that of the queries. So the gradients of keys and values add up where they
    stay, and those of queries come home as outputs did.

What travels in backward. To compute its part, the holder of the keys needs queries q, gradients g of the outputs, and
the merged log-sum-exp and output o. But the output enters by its product with the gradient alone (`kernels.contract`):
any o' with g . o' = g . o gives the same gradients. The projection of o on g is one, and takes one number a head to
send. It is no longer than o, so it fits every type that o fits, and rounds no worse.

Whoever has many heads of queries for each of keys and values sends less by `ring`. With as many, a rank sends 5 tensors
here (q, o; q, g, dq), where a ring sends 6 (k, v; k, v, dk, dv).

Layers with a sliding window need only the window before each cut: they gather it at once (`gather`). So do layers in
which tokens of an image look at each other, in packs that have some.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_hetero.attention.context import Place
from hf_hetero.attention.gather import gather
from hf_hetero.attention.kernels.contract import Kernel, Scores, merge, sinks_gradient, with_sinks
from hf_hetero.attention.ring import require_parts
from hf_hetero.attention.routes import Meeting, RingRoute, Round, token_ring_route
from hf_hetero.attention.traffic import Leg, Messages

Answer = Callable[[torch.Tensor, Meeting], torch.Tensor]
"""(what came with another rank's queries, which keys they meet) -> what goes back to that rank; a row a query."""

Take = Callable[[torch.Tensor, torch.Tensor], None]
"""(rows of this rank's queries, what came back for them)."""


def token_ring(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, place: Place) -> torch.Tensor:
    """Compute attention of a pack that is spread over a group in any layout (`methods.attend`).

    Raises:
        CollectiveFailed: a rank is gone, or waited longer than the group's timeout.
        UnsupportedModel: the kernel gives no log-sum-exp to merge by, or lacks a feature.
    """
    if scores.window is not None or scores.mutual:
        return gather(q, k, v, scores, place)
    require_parts(place.context.kernel, scores)
    out: Any = _TokenRing.apply(q, k, v, scores.sinks, scores.without_sinks(), place)
    return out


class _TokenRing(torch.autograd.Function):
    """`_TokenRing` merges in forward what others computed for its queries; backward sends these around once more."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        scores: Scores,
        place: Place,
    ) -> torch.Tensor:
        there = _Journey(place, "token ring")
        out, lse = place.once("token ring", lambda: there.attend(q, k, v, sinks, scores))
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.call = scores, _Journey(place, "token ring in backward")
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        scores, there = ctx.call
        grad = grad_outputs[0].contiguous()
        grads = there.gradients(grad, q, k, v, out, lse, scores)
        return *grads, sinks_gradient(grad, out, lse, sinks), None, None


class _Journey:
    """A `_Journey` is one pass of all ranks' queries along a route, forward or backward."""

    def __init__(self, place: Place, operation: str) -> None:
        context = place.context
        self._kernel: Kernel = context.kernel
        self._route: RingRoute = context.shared(
            "token ring", lambda: token_ring_route(context.layout, context.group_rank, context.device)
        )
        self._place, self._operation = place, operation

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output in q's type, and the log-sum-exp."""
        value_dim = v.shape[2]

        def meet(queries: torch.Tensor, meeting: Meeting) -> tuple[torch.Tensor, torch.Tensor]:
            assert self._kernel.forward is not None
            if not queries.numel():  # a rank without tokens
                empty = queries.new_empty(*queries.shape[:2], value_dim)
                return empty, empty.new_empty(empty.shape[:2], dtype=wide)
            keys, values = meeting.keys_of(k), meeting.keys_of(v)
            (padded,) = self._kernel.padded([values], k.shape[2])
            part, part_lse = self._kernel.forward(queries, keys, padded, meeting.segments, scores)
            return part[..., :value_dim], part_lse

        wide = torch.promote_types(q.dtype, torch.float32)
        under_way = self._post(0, q, {}, 0)
        out, lse = meet(q, self._route.local)
        out = out.to(lse.dtype)  # merged in the wider type, or each round would round once more

        def answer(queries: torch.Tensor, meeting: Meeting) -> torch.Tensor:
            part, part_lse = meet(queries, meeting)
            return torch.cat([part, _as_elements(part_lse, part.dtype)], dim=2)

        def take(rows: torch.Tensor, came: torch.Tensor) -> None:
            part, part_lse = came[..., :value_dim].to(lse.dtype), _as_numbers(came[..., value_dim:], lse.dtype)
            out[rows], lse[rows] = merge(out[rows], lse[rows], part, part_lse)

        self._go_round(under_way, q, value_dim + lse.itemsize // q.itemsize, answer, take)
        # a sink is one key, so it joins once, after the last round, and not with each rank's keys
        out, lse = with_sinks(out, lse, sinks)
        return out.to(q.dtype), lse

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
        """Return dq, dk, dv of this rank's rows, summed in fp32 or wider."""
        wide = torch.promote_types(q.dtype, torch.float32)
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
        share = share_along(grad, out.to(lse.dtype))
        with_queries = [q, grad, _as_elements(lse, q.dtype), _as_elements(share, q.dtype)]
        rows, widths = torch.cat(with_queries, dim=2), [x.shape[2] for x in with_queries]

        def meet(queries: tuple[torch.Tensor, ...], meeting: Meeting) -> torch.Tensor:
            """Add what these queries give to keys and values; return their own gradients from them."""
            assert self._kernel.backward is not None
            their_grad, their_q, their_out, their_lse = queries
            keys, values = meeting.keys_of(k), meeting.keys_of(v)
            their_grad, values, their_out = self._kernel.padded([their_grad, values, their_out], k.shape[2])
            call = (their_grad, their_q, keys, values, their_out, their_lse, meeting.segments, scores)
            dq, dk, dv = self._kernel.backward(*call)
            meeting.add_to(grad_k, dk)
            meeting.add_to(grad_v, dv[..., : v.shape[2]])
            return dq

        def answer(came: torch.Tensor, meeting: Meeting) -> torch.Tensor:
            # copied apart, because kernels load rows that begin at multiples of 16 bytes
            their_q, their_grad, *numbers = (part.contiguous() for part in came.split(widths, dim=2))
            their_lse, their_share = (_as_numbers(x, lse.dtype) for x in numbers)
            their_out = along(their_grad, their_share).to(q.dtype)
            return meet((their_grad, their_q, their_out, their_lse), meeting).to(q.dtype)

        def take(of: torch.Tensor, came: torch.Tensor) -> None:
            grad_q[of] += came

        under_way = self._post(0, rows, {}, 0)
        if q.numel():
            grad_q += meet((grad, q, out, lse), self._route.local)
        self._go_round(under_way, rows, q.shape[2], answer, take)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)

    def _go_round(self, under_way: Messages, rows: torch.Tensor, width: int, answer: Answer, take: Take) -> None:
        """Lend queries to all others and take back what they got; meanwhile answer those of the others.

        The queries of round n + 1 and the answers of round n - 1 set out together, before the answers of round n are
        computed. All ranks post these messages in one order, whichever of them they have no part in: so no ranks wait
        for each other in a circle (`routes.RingRoute`).

        Args:
            under_way: the queries of round 1.
            rows: what leaves with this rank's queries, a row a query.
            width: elements of an answer for each query and head.
            answer, take: what to do with others' queries, and with the answers to one's own.
        """
        turns, answers = self._route.rounds, dict[int, torch.Tensor]()
        for index in range(len(turns) + 2):
            queries, came = under_way.wait()
            under_way = self._post(index + 1, rows, answers, width)
            if came is not None:
                lent = turns[index - 2].send_rows
                assert lent is not None
                take(lent, came)
            if queries is not None:
                meeting = turns[index].meeting
                assert meeting is not None
                answers[index] = answer(queries, meeting)

    def _post(self, index: int, rows: torch.Tensor, answers: dict[int, torch.Tensor], width: int) -> Messages:
        """Set under way the queries of one round, and the answers of the last round but one before it."""
        turns = self._route.rounds
        lending = turns[index] if index < len(turns) else None
        answering = turns[index - 2] if 2 <= index < len(turns) + 2 else None
        # gloo matches messages of two ranks by the tag, which no two messages of a pass from one to the other share;
        # NCCL matches them by their order, which is that of the rounds on both sides
        legs = [
            NOTHING if lending is None else _lent(lending, rows),
            NOTHING if answering is None else _answered(answering, answers.pop(index - 2, None), rows, width),
        ]
        number = min(index + 1, len(turns))
        return Messages(legs, self._place.context.peers, f"{self._operation}, round {number}", self._place)


NOTHING = Leg(None, None, 0, 0, 0)


def _lent(turn: Round, rows: torch.Tensor) -> Leg:
    """Return the message of queries of a round: to the rank that many places on, from the one as many places back."""
    outgoing = None if turn.send_rows is None else rows[turn.send_rows]
    incoming = rows.new_empty(turn.num_received, *rows.shape[1:]) if turn.num_received else None
    return Leg(outgoing, incoming, turn.send_to, turn.receive_from, 2 * turn.number)


def _answered(turn: Round, outgoing: torch.Tensor | None, rows: torch.Tensor, width: int) -> Leg:
    """Return the message of a round's answers: it goes where the queries came from."""
    num = 0 if turn.send_rows is None else len(turn.send_rows)
    incoming = rows.new_empty(num, rows.shape[1], width) if num else None
    return Leg(outgoing, incoming, turn.receive_from, turn.send_to, 2 * turn.number + 1)


def share_along(grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return what tells the projections of outputs on their gradients to who has the gradients (`along`).

    Args:
        grad: shape (t, H, Dv).
        out: shape (t, H, Dv); computed in its type.

    Returns:
        Shape (t, H); 0 where the gradient is 0.
    """
    unit = _unit(grad, out.dtype)
    # an element of `unit` is 1 or -1, so that its square is 1 at least, unless the gradient is 0
    return (unit * out).sum(-1) / unit.square().sum(-1).clamp(min=1)


def along(grad: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Return the projections of outputs on their gradients, shape (t, H, Dv), in the type of `share_along`'s result."""
    return share[..., None] * _unit(grad, share.dtype)


def _unit(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return gradients by their largest element, so that their squares neither overflow nor vanish; zeros stay."""
    wide = grad.to(dtype)
    largest = wide.abs().amax(-1, keepdim=True)
    return wide / torch.where(largest > 0, largest, 1)


def _as_elements(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the bytes of one number a head, shape (t, H), along a new dim, as elements of a type that is no wider."""
    return numbers.contiguous()[..., None].view(dtype)


def _as_numbers(elements: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Invert `_as_elements`."""
    return elements.contiguous().view(dtype)[..., 0]
