"""The messages of a ring cannot wait for each other in a circle, in whatever rounds each rank is idle.

On a GPU a rank's messages in a group leave in one stream, in the order in which they were posted (`batch_isend_irecv`
with NCCL): a post is done when all its messages have met theirs, and only then does the next one begin. A message
meets its other half when both stand at the head of their streams. gloo has no such order, so this is a model of it, fed
with what the ring posts.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hf_hetero.attention import ring
from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.kernels.contract import Kernel, Scores, Segments
from hf_hetero.attention.routes import ring_route
from hf_hetero.layout import Layout, blocks_of, two_level, zigzag

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Message:
    """What one rank does for a message: it sends it to its peer, or receives it."""

    sends: bool
    peer: int
    tag: int
    num_elements: int

    def other_half(self, me: int) -> Message:
        """What the peer must do for it."""
        return Message(not self.sends, me, self.tag, self.num_elements)


Post = tuple[Message, ...]


def unfinished(streams: Sequence[Sequence[Post]]) -> list[int]:
    """Ranks that wait for ever when each works off its posts in order."""
    left = [deque(set(post) for post in stream if post) for stream in streams]
    moved = True
    while moved:
        moved = False
        for me, stream in enumerate(left):
            for message in list(stream[0]) if stream else ():
                peer, other = left[message.peer], message.other_half(me)
                if peer and other in peer[0]:
                    stream[0].remove(message)
                    peer[0].remove(other)
                    moved = True
            while stream and not stream[0]:
                stream.popleft()
                moved = True
    return [rank for rank, stream in enumerate(left) if stream]


class Posted:
    """In the place of `Shift`: notes its messages; what arrives is zeros."""

    stream: list[Post]

    def __init__(self, outgoing: Any, incoming: Any, send_to: int, receive_from: int, tag: int, *words: Any) -> None:
        self._incoming = None if incoming is None else incoming.zero_()
        halves = ((True, send_to, outgoing), (False, receive_from, incoming))
        self.stream.append(tuple(Message(s, peer, tag, x.numel()) for s, peer, x in halves if x is not None))

    def wait(self) -> Any:
        return self._incoming


def no_forward(q: Any, k: Any, v: Any, segments: Segments, scores: Scores) -> Any:
    return torch.zeros_like(q), torch.zeros(q.shape[:2])


def no_backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, segments: Segments, scores: Scores) -> Any:
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


KERNEL = Kernel("none", None, frozenset({torch.float32}), frozenset(), no_forward, no_backward, unequal_values=True)


def streams_of(layout: Layout, how: str, num_layers: int, monkeypatch: pytest.MonkeyPatch) -> list[list[Post]]:
    """What each rank posts, forward and backward; layers are recomputed, and post again, or not."""
    monkeypatch.setattr(ring, "Shift", Posted)
    ranks, streams = tuple(range(layout.degree)), []
    for me in ranks:
        Posted.stream = []
        group: Any = "the group"
        context = AttentionContext(layout, ranks, me, group, "ring", KERNEL, CPU, keeps=how == "kept")

        def attend(x: torch.Tensor, k: torch.Tensor, layer: int, context: Any = context, me: int = me) -> Any:
            route = context.shared("ring", lambda: ring_route(layout, me, CPU))
            return ring.attend_in_rounds(x, k, k, Scores(1.0), context.at(layer), context.peers, route)

        x, k = (torch.zeros(layout.rank_tokens[me], 1, 1, requires_grad=True) for _ in range(2))
        out = x
        for layer in range(num_layers):
            out = attend(out, k, layer) if how == "plain" else checkpoint(attend, out, k, layer, use_reentrant=False)
        out.sum().backward()
        streams.append([post for post in Posted.stream if post])
    return streams


def by_own_index(stream: Sequence[Post]) -> list[Post]:
    """The same posts of one layer, but in backward gradients leave one post after the keys they are of."""
    keys, homes = ([post for post in stream if post[0].tag % 2 == odd] for odd in (0, 1))
    forward, again = keys[: len(homes)], keys[len(homes) :]
    backward = [post for index, home in enumerate(homes) for post in (*again[index + 1 : index + 2], home)]
    return [*forward, *again[:1], *backward]


def cut_packs(num: int) -> list[Layout]:
    """Random packs on groups of several sizes; every third as the blocks of a larger group see it."""
    draw, packs = random.Random(0), list[Layout]()
    for number in range(num):
        degree = (2, 4, 6, 8, 12)[number % 5]
        lengths = [1 + int(2 ** draw.uniform(3, 8)) for _ in range(draw.randint(degree, 6 * degree))]
        packs.append(blocks_of(two_level(lengths, 2 * degree, 2)) if number % 3 == 0 else zigzag(lengths, degree))
    return packs


PACKS = cut_packs(40)


@pytest.mark.parametrize("how", ["plain", "recomputed", "kept"])
def test_no_order_of_messages_is_a_circle(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward, and recompute that posts again: in every pack all messages meet their other halves."""
    for layout in PACKS:
        assert not unfinished(streams_of(layout, how, 2, monkeypatch)), layout


def test_the_model_finds_circles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of each rank's own rounds many of these packs stand still; and so does a message nobody takes."""
    streams = [streams_of(layout, "plain", 1, monkeypatch) for layout in PACKS]
    assert sum(bool(unfinished(list(map(by_own_index, ranks)))) for ranks in streams) >= 4
    assert unfinished([[(Message(True, 1, 0, 4),)], []]) == [0]
    assert unfinished([[(Message(True, 1, 0, 4),)], [(Message(False, 0, 0, 5),)]]) == [0, 1]


def test_idle_ranks_post_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that one rank holds whole cost no message."""
    assert not any(streams_of(zigzag([8, 8, 8, 8], 4), "plain", 2, monkeypatch))
