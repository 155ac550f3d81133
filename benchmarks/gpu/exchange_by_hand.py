"""The ranks of a group, one after another in one process: what they exchange is handed over by hand.

Two process groups in one process would need a thread for each rank, and on a GPU autograd has one thread for all of
them, in which a rank that waits in its backward pass would keep the others from theirs. So nobody waits here: `Post`
takes what a rank sends, and gives it what it has of the others, or zeros. The ranks go round several times. A message
that hangs on n others is right after n + 1 rounds, whatever was in its place before; then rounds change nothing more.

`attention.traffic` is the one place by which anything crosses ranks inside a layer: what it has for that is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from hf_hetero.attention import ring, token_ring, traffic
from hf_hetero.attention.context import AttentionContext, Peers, Place
from hf_hetero.attention.kernels.contract import Kernel, Scores
from hf_hetero.attention.methods import attend
from hf_hetero.attention.traffic import Leg
from hf_hetero.layout import Layout, layout_of
from hf_hetero.plan import Group

ROUNDS = 6
"""One more than the longest chain of messages: heads, keys, their gradients, those of heads, and the last arrival."""

Key = tuple[Any, ...]
Tensors = tuple[torch.Tensor, ...]


class Post:
    """Messages between ranks, by what they are, who sends and who receives.

    Attributes:
        is_settled: messages are what they will be: none is taken any more, and those for a rank lie ready, so that its
            seconds are those of computing alone.
        num_changed: messages of the last round that were not, to the bit, those of the round before.
    """

    def __init__(self) -> None:
        self.is_settled, self.num_changed = False, 0
        self._messages: dict[Key, torch.Tensor] = {}
        self._arrived: dict[Key, torch.Tensor] = {}

    @contextmanager
    def carrying(self) -> Iterator[None]:
        """Meanwhile, all that crosses ranks inside a layer goes through here."""
        exchanges = patch.object(traffic, "_exchange", self._exchange)
        with exchanges, patch.object(ring, "Shift", self._shift), patch.object(token_ring, "Messages", self._several):
            yield

    def _exchange(
        self,
        buffer: torch.Tensor,
        in_splits: list[int],
        out_splits: list[int],
        peers: Peers,
        operation: str,
        place: Place,
    ) -> torch.Tensor:
        what, me = (operation, place.layer), peers.ranks[peers.me]
        if self.is_settled:
            return self._arrived[*what, me]
        for receiver, part in zip(peers.ranks, buffer.detach().split(in_splits), strict=True):
            self._send((*what, me, receiver), part)
        parts = [
            self._message((*what, sender, me), buffer.new_zeros(size))
            for sender, size in zip(peers.ranks, out_splits, strict=True)
        ]
        self._arrived[*what, me] = torch.cat(parts)
        return self._arrived[*what, me]

    def _shift(
        self,
        outgoing: torch.Tensor | None,
        incoming: torch.Tensor | None,
        send_to: int,
        receive_from: int,
        tag: int,
        peers: Peers,
        operation: str,
        place: Place,
    ) -> _Arrival:
        what, me = (operation, tag, place.layer), peers.ranks[peers.me]
        if outgoing is not None and not self.is_settled:
            self._send((*what, me, peers.ranks[send_to]), outgoing.detach())
        if incoming is None:
            return _Arrival(None)
        key = (*what, peers.ranks[receive_from], me)
        return _Arrival(self._message(key, incoming.zero_()) if not self.is_settled else self._messages[key])

    def _several(self, legs: Sequence[Leg], peers: Peers, operation: str, place: Place) -> _Arrivals:
        sides = [(leg.outgoing, leg.incoming, leg.send_to, leg.receive_from, leg.tag) for leg in legs]
        return _Arrivals([self._shift(*side, peers, operation, place).message for side in sides])

    def _send(self, key: Key, message: torch.Tensor) -> None:
        before = self._messages.get(key)
        self.num_changed += before is None or not torch.equal(before, message)
        self._messages[key] = message.clone()

    def _message(self, key: Key, unknown: torch.Tensor) -> torch.Tensor:
        found = self._messages.get(key)
        return unknown if found is None else found


@dataclass(frozen=True)
class _Arrival:
    """What a `Shift` has brought."""

    message: torch.Tensor | None

    def wait(self) -> torch.Tensor | None:
        """It is here."""
        return self.message


@dataclass(frozen=True)
class _Arrivals:
    """What `Messages` have brought."""

    messages: list[torch.Tensor | None]

    def wait(self) -> list[torch.Tensor | None]:
        """All of it is here."""
        return self.messages


@dataclass(frozen=True)
class Pack:
    """A pack on its way through attention, forward and backward.

    Args:
        lengths: of its samples.
        q, k, v, grad: shapes (T, H, D), (T, Hk, D), (T, Hk, D) and (T, H, D); the last is the gradient of the output.
    """

    lengths: tuple[int, ...]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor

    @classmethod
    def random(cls, lengths: list[int], heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Pack:
        """The same numbers for the same lengths and heads."""
        generator = torch.Generator(device).manual_seed(0)
        num_q, num_kv, size = heads
        shapes = [(sum(lengths), n, size) for n in (num_q, num_kv, num_kv, num_q)]
        made = [torch.randn(s, generator=generator, device=device, dtype=torch.float32).to(dtype) for s in shapes]
        return cls(tuple(lengths), *made)

    def to(self, dtype: torch.dtype) -> Pack:
        """The same numbers in another type."""
        return Pack(self.lengths, *(x.to(dtype) for x in (self.q, self.k, self.v, self.grad)))


class VirtualGroup:
    """A group of a plan, all of whose ranks are here.

    Args:
        pack: that they share.
        degree, method: of the group; `ulysses_ring` has blocks of two ranks.
        kernel: of each rank.
    """

    def __init__(self, pack: Pack, degree: int, method: str, kernel: Kernel) -> None:
        inner = 2 if method == "ulysses_ring" else None
        self._group = Group(tuple(range(degree)), tuple(range(len(pack.lengths))), method, inner)
        self.layout: Layout = layout_of(self._group, pack.lengths)
        self._kernel, self._scores, self._post = kernel, Scores(pack.q.shape[2] ** -0.5), Post()
        self._rows = [rows_of(self.layout, rank).to(pack.q.device) for rank in range(degree)]
        self._parts = [tuple(x[rows] for x in (pack.q, pack.k, pack.v, pack.grad)) for rows in self._rows]
        self._contexts = [self._context(rank, pack.q.device) for rank in range(degree)]

    def _context(self, rank: int, device: torch.device) -> AttentionContext:
        ranks = self._group.ranks
        return AttentionContext(self.layout, ranks, rank, None, self._group.method, self._kernel, device)

    def go_round(self, rounds: int = ROUNDS) -> Tensors:
        """Let all ranks send and receive; outputs and gradients (dq, dk, dv) of all tokens, in the pack's order."""
        found: list[Tensors] = []
        with self._post.carrying():
            for _ in range(rounds):
                self._post.num_changed = 0
                found = [self.compute(rank) for rank in self._group.ranks]
        self._post.is_settled = True
        return tuple(self._whole([parts[n] for parts in found]) for n in range(4))

    @property
    def num_changed(self) -> int:
        """Messages that the last round still changed."""
        return self._post.num_changed

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Meanwhile `compute` finds what the others have sent."""
        with self._post.carrying():
            yield

    def compute(self, rank: int) -> Tensors:
        """One rank's attention, forward and backward: its output and gradients."""
        q, k, v, grad = self._parts[rank]
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(leaves[0], leaves[1], leaves[2], self._scores, self._contexts[rank].at(0))
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    def _whole(self, parts: list[torch.Tensor]) -> torch.Tensor:
        whole = parts[0].new_empty(self.layout.num_tokens, *parts[0].shape[1:])
        for rows, part in zip(self._rows, parts, strict=True):
            whole[rows] = part
        return whole


def rows_of(layout: Layout, rank: int) -> torch.Tensor:
    """Which rows of the pack a rank holds, in its own order."""
    starts = layout.cu_seqlens
    spans = layout.spans[rank]
    rows = [torch.arange(starts[s.sample] + s.start, starts[s.sample] + s.end) for s in spans]
    return torch.cat([torch.zeros(0, dtype=torch.long), *rows])
