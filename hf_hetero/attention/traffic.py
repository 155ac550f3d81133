"""All that crosses ranks inside a layer goes through here: an uneven all-to-all with a gradient, and messages.

Every exchange is named after its step, micro-batch, layer and ranks, so that a failing one can be found. With gradient
checkpointing, the context keeps what arrived, and the recompute repeats no exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives

from hf_hetero.attention.context import Peers, Place
from hf_hetero.ranks.naming import named
from hf_hetero.ranks.waits import noted


class _AllToAll(torch.autograd.Function):
    """`_AllToAll` exchanges uneven parts of a flat buffer; its gradient is the same exchange the other way."""

    @staticmethod
    def forward(
        ctx: Any,
        buffer: torch.Tensor,
        in_splits: list[int],
        out_splits: list[int],
        peers: Peers,
        operation: str,
        place: Place,
    ) -> torch.Tensor:
        ctx.exchange = out_splits, in_splits, peers, f"{operation} of gradients", place

        def exchange() -> tuple[torch.Tensor]:
            return (_exchange(buffer, in_splits, out_splits, peers, operation, place),)

        # an alias: what is kept must not be the very tensor that autograd marks as this call's output
        return place.once(operation, exchange)[0].view(-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        grad = _exchange(grad_outputs[0].contiguous(), *ctx.exchange)
        return grad, None, None, None, None, None


def _exchange(
    buffer: torch.Tensor, in_splits: list[int], out_splits: list[int], peers: Peers, operation: str, place: Place
) -> torch.Tensor:
    """Exchange parts of a flat buffer, without a gradient; the error of a failing exchange names it."""
    group = peers.group
    assert group is not None
    place.context.sent.num_bytes += (sum(in_splits) - in_splits[peers.me]) * buffer.itemsize
    in_splits, out_splits = (_over_group(splits, peers, group) for splits in (in_splits, out_splits))
    with named(operation, place.where), noted(place.context.waits, operation, place.where):
        return collectives.wait_tensor(collectives.all_to_all_single(buffer, out_splits, in_splits, group))


def _over_group(splits: list[int], peers: Peers, group: dist.ProcessGroup) -> list[int]:
    """Return the elements for each rank of the process group: none for those that are not among the peers."""
    elements = [0] * group.size()
    for rank, num_elements in zip(peers.ranks, splits, strict=True):
        elements[dist.get_group_rank(group, rank)] = num_elements
    return elements


def all_to_all(
    buffer: torch.Tensor, in_splits: list[int], out_splits: list[int], peers: Peers, operation: str, place: Place
) -> torch.Tensor:
    """Send consecutive parts of a flat buffer to some ranks of a process group, and get theirs. Differentiable.

    Args:
        buffer: flat and contiguous.
        in_splits, out_splits: elements for, and from, each of the peers.
        peers: who exchanges; all ranks of their process group must call this, each with peers of its own.
        operation, place: for messages, and to keep what arrived.

    Raises:
        CollectiveFailed: the exchange failed or waited longer than the group's timeout.
    """
    arrived: Any = _AllToAll.apply(buffer, in_splits, out_splits, peers, operation, place)
    return arrived


@dataclass(frozen=True, slots=True)
class Leg:
    """A `Leg` is a message from this rank, one to it, or both; None is none.

    Args:
        outgoing: for the rank `send_to`. Kept until it has left.
        incoming: filled with what comes from `receive_from`.
        send_to, receive_from: positions among the peers.
        tag: tells the messages between two ranks apart.
    """

    outgoing: torch.Tensor | None
    incoming: torch.Tensor | None
    send_to: int
    receive_from: int
    tag: int


def _begun(ops: list[dist.P2POp]) -> list[Any]:
    """Return what can be waited for of messages that begin as one batch."""
    try:
        return dist.batch_isend_irecv(ops)
    except BaseException:
        _close_batch(ops[0])
        raise


def _close_batch(op: dist.P2POp) -> None:
    """Close a batch that was broken off before it began.

    Torch leaves it open, and NCCL takes what the thread calls later for a part of it: nothing of that would be sent.
    """
    opened, group = dist.distributed_c10d._world.pg_coalesce_state, op.group  # pyright: ignore[reportPrivateUsage]
    assert group is not None
    if opened.pop(group, None) is not None:
        with suppress(Exception):  # its group has failed
            group._end_coalescing(op.tensor.device)  # pyright: ignore[reportPrivateUsage]


class Messages:
    """`Messages` are point-to-point and under way at once, in one batch. One computes until `wait`.

    Args:
        legs: what leaves and what comes.
        peers: who exchanges.
        operation, place: for messages.

    Raises:
        CollectiveFailed: a rank is gone.
    """

    def __init__(self, legs: Sequence[Leg], peers: Peers, operation: str, place: Place) -> None:
        assert peers.group is not None
        self._legs, self._name, self._waits = legs, (operation, place.where), place.context.waits
        ops: list[dist.P2POp] = []
        for leg in legs:
            if leg.outgoing is not None and leg.outgoing.numel():  # both sides know the size: nobody sends nothing
                ops.append(dist.P2POp(dist.isend, leg.outgoing, peers.ranks[leg.send_to], peers.group, leg.tag))
                place.context.sent.num_bytes += leg.outgoing.nbytes
            if leg.incoming is not None and leg.incoming.numel():
                ops.append(dist.P2POp(dist.irecv, leg.incoming, peers.ranks[leg.receive_from], peers.group, leg.tag))
        # as one batch: alone, a send that waits for its receiver could hold up the receive behind it
        with named(*self._name):
            self._works = _begun(ops) if ops else []

    def wait(self) -> list[torch.Tensor | None]:
        """Return what arrived by each leg, once all is there.

        Raises:
            CollectiveFailed: a rank is gone, or waited longer than the group's timeout.
        """
        with named(*self._name), noted(self._waits, *self._name):
            for work in self._works:
                work.wait()
        return [leg.incoming for leg in self._legs]


class Shift:
    """A `Shift` is `Messages` of a single `Leg`: to one rank, from another, or either.

    Args:
        outgoing, incoming, send_to, receive_from, tag: as in `Leg`.
        peers, operation, place: as in `Messages`.

    Raises:
        CollectiveFailed: a rank is gone.
    """

    def __init__(
        self,
        outgoing: torch.Tensor | None,
        incoming: torch.Tensor | None,
        send_to: int,
        receive_from: int,
        tag: int,
        peers: Peers,
        operation: str,
        place: Place,
    ) -> None:
        self._messages = Messages([Leg(outgoing, incoming, send_to, receive_from, tag)], peers, operation, place)

    def wait(self) -> torch.Tensor | None:
        """Return what arrived, once it is there.

        Raises:
            CollectiveFailed: a rank is gone, or waited longer than the group's timeout.
        """
        (arrived,) = self._messages.wait()
        return arrived
