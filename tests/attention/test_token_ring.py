"""Queries that go round and answers that come home: exact whatever the layout, and in no circle of waiting ranks.

`test_methods` compares the method with dense attention as it does every other. Here are layouts that no plan makes,
what only this method does, and the order of its messages, by the model of `test_ring`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from attention.dense_attention import Case, dense
from attention.test_methods import NAMES, PACKS, assembled, case_of, context_of, rows_of
from attention.test_ring import KERNEL, Message, Post, cut_packs, unfinished
from helpers import run_ranks
from torch.utils.checkpoint import checkpoint

from hf_hetero.attention import token_ring
from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.kernels.contract import Kernel, Scores, Segments
from hf_hetero.attention.kernels.cpu import CPU
from hf_hetero.attention.kernels.plain import PLAIN
from hf_hetero.attention.methods import attend
from hf_hetero.attention.traffic import Leg
from hf_hetero.errors import UnsupportedModel
from hf_hetero.layout import Layout, Span, zigzag
from hf_hetero.ranks.groups import GroupPool

HOST = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------- any layout


def scattered(lengths: Sequence[int], degree: int, seed: int) -> Layout:
    """Cut anywhere and dealt to anybody: ranks hold unequal tokens, some of them none, in any order of samples."""
    draw = random.Random(seed)
    spans: list[list[Span]] = [[] for _ in range(degree)]
    for sample, length in enumerate(lengths):
        cuts = sorted({0, length, *(draw.randint(0, length) for _ in range(draw.randint(0, 6)))})
        for start, end in pairwise(cuts):
            spans[draw.randrange(degree - seed % 2)].append(Span(sample, start, end))  # every second: one rank has none
    for of_rank in spans:
        draw.shuffle(of_rank)
    return Layout(tuple(lengths), tuple(map(tuple, spans)), "zigzag")


SCATTERED = [(pack, seed) for pack in PACKS for seed in range(4)]


def on_scattered(heads: tuple[int, int], features: dict[str, Any]) -> list[list[torch.Tensor]]:
    """Each case's rows of this rank, and what it finds for them."""
    world, me = dist.get_world_size(), dist.get_rank()
    pool, found = GroupPool({world}, 30, 30), list[list[torch.Tensor]]()
    group = pool.get(tuple(range(world)))
    for pack, seed in SCATTERED:
        case = Case(PACKS[pack], heads, **features)
        layout = scattered(case.lengths, world, seed)
        context = AttentionContext(layout, tuple(range(world)), me, group, "token_ring", CPU, HOST)
        rows = rows_of(layout, me)
        q, k, v, weights, sinks = (x if x.dim() == 1 else x[rows] for x in case.tensors())
        leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
        out = attend(q, k, v, Scores(case.scaling, None, case.softcap, sinks), context.at(0))
        grads = torch.autograd.grad((out * weights).sum(), leaves)
        found.append([rows, out.detach(), *grads])
    pool.close()
    return found


@pytest.mark.parametrize(
    ("num_ranks", "heads", "features"),
    [
        (2, (4, 4), {}),
        (3, (4, 2), {"softcap": 3.0}),
        (4, (3, 3), {"head_dim": 12, "value_dim": 4}),
    ],
)
def test_any_layout_is_exact(num_ranks: int, heads: tuple[int, int], features: dict[str, Any]) -> None:
    """Whoever holds what, in any order, also where a rank has nothing: output and gradients within 1e-12 in fp64."""
    ranks = run_ranks(on_scattered, num_ranks, heads, features)
    for number, (pack, seed) in enumerate(SCATTERED):
        expected = dense(Case(PACKS[pack], heads, **features, has_sinks=True))
        found = assembled([rank[number] for rank in ranks])
        for name, ours, theirs in zip(NAMES, found, expected, strict=True):
            assert ours.shape == theirs.shape, (pack, seed, name)
            assert not theirs.numel() or (ours - theirs).abs().max() < 1e-12, (pack, seed, name)


def wrongly(how: str) -> list[torch.Tensor]:
    """One case by a token ring that leaves something out."""
    pool, case = GroupPool({dist.get_world_size()}, 30, 30), case_of("one long", "mha", "plain")
    right = token_ring.merge
    if how == "answers are not merged":
        token_ring.merge = lambda out, lse, *answer: (out, lse)  # type: ignore[assignment]
    elif how == "answers are merged without their weight":
        token_ring.merge = lambda out, lse, part, part_lse: right(out, lse, part, lse)  # type: ignore[assignment]
    else:
        token_ring.share_along = lambda grad, out: torch.zeros(out.shape[:2], dtype=out.dtype)
    context = context_of(case, "token_ring", pool, 2)
    rows = rows_of(context.layout, context.group_rank)
    q, k, v, weights, sinks = (x if x.dim() == 1 else x[rows] for x in case.tensors())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(q, k, v, Scores(case.scaling), context.at(0))
    grads = torch.autograd.grad((out * weights).sum(), leaves)
    pool.close()
    return [rows, out.detach(), *grads, torch.zeros_like(sinks)]


@pytest.mark.parametrize(
    ("how", "wrong"),
    [
        ("answers are not merged", {"out", "dq", "dk", "dv"}),
        ("answers are merged without their weight", {"out", "dq", "dk", "dv"}),
        ("outputs stay out of the gradients of others' keys", {"dq", "dk"}),
    ],
)
def test_what_is_left_out_is_noticed(how: str, wrong: set[str]) -> None:
    """The comparison can fail: each of these is far outside its tolerance, where it should be and nowhere else."""
    found = assembled(run_ranks(wrongly, 2, how))
    expected = dense(case_of("one long", "mha", "plain"))
    off = {n for n, ours, theirs in zip(NAMES, found, expected, strict=True) if (ours - theirs).abs().max() > 1e-3}
    assert off == wrong


# ------------------------------------------------------------------------------------------- in place of the output


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e-42, 1e30, 0.0])
@pytest.mark.parametrize("kernel", [CPU, PLAIN], ids=lambda kernel: kernel.name)
def test_a_projection_takes_the_place_of_the_output(kernel: Kernel, size: float) -> None:
    """A kernel's gradients are the same with the output's part along its gradient, however large that gradient is.

    It is not the output: another product with the gradient gives other gradients.
    """
    torch.manual_seed(0)
    q, grad = (torch.randn(9, 4, 8, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(9, 2, 8, dtype=torch.float64) for _ in range(2))
    grad[3] = 0.0
    grad *= size
    segments, scores = Segments.packed((9,), HOST), Scores(0.3)
    assert kernel.forward is not None
    assert kernel.backward is not None
    out, lse = kernel.forward(q, k, v, segments, scores)
    along = token_ring.along(grad, token_ring.share_along(grad, out))
    assert along.norm() <= out.norm() * (1 + 1e-12)
    assert (along - out).norm() > 0.5 * out.norm()
    expected = kernel.backward(grad, q, k, v, out, lse, segments, scores)
    found = kernel.backward(grad, q, k, v, along, lse, segments, scores)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * size
    if size:
        off = kernel.backward(grad, q, k, v, 2 * along, lse, segments, scores)
        assert (off[0] - expected[0]).abs().max() > 1e-3 * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_travel_as_elements(dtype: torch.dtype) -> None:
    """A log-sum-exp keeps all its digits among elements of a shorter type; infinities too, and in an empty message."""
    numbers = torch.tensor([[0.1, -3.7e5], [float("inf"), 1e-30]])
    elements = token_ring._as_elements(numbers, dtype)
    assert elements.shape == (2, 2, 4 // dtype.itemsize)
    assert elements.dtype == dtype
    beside = torch.cat([elements, torch.zeros(2, 2, 3, dtype=dtype)], dim=2)
    assert torch.equal(token_ring._as_numbers(beside[..., : elements.shape[2]], torch.float32), numbers)
    assert token_ring._as_numbers(token_ring._as_elements(numbers[:0], dtype), torch.float32).shape == (0, 2)


def test_a_kernel_without_log_sum_exp_is_refused() -> None:
    """Before any message leaves, with the methods to leave out; a layer with a window gathers, and asks for none."""
    bare = Kernel("bare", None, frozenset({torch.float32}), frozenset(), attend=lambda q, k, v, segments, scores: q)
    group: Any = "the group"
    context = AttentionContext(zigzag([8], 2), (0, 1), 0, group, "token_ring", bare, HOST)
    x = torch.randn(4, 2, 8)
    with pytest.raises(UnsupportedModel, match=r"'bare' gives no log-sum-exp.*token_ring.*HeteroConfig\.methods"):
        attend(x, x, x, Scores(1.0), context.at(0))


# ------------------------------------------------------------------------------------------------ order of messages


class Posted:
    """In the place of `Messages`: notes them; what arrives is zeros."""

    stream: list[Post]

    def __init__(self, legs: Sequence[Leg], *words: Any) -> None:
        self._arrived = [None if leg.incoming is None else leg.incoming.zero_() for leg in legs]
        post: list[Message] = []
        for leg in legs:
            sides = ((True, leg.send_to, leg.outgoing), (False, leg.receive_from, leg.incoming))
            post += [Message(s, peer, leg.tag, x.numel()) for s, peer, x in sides if x is not None]
        self.stream.append(tuple(post))

    def wait(self) -> list[torch.Tensor | None]:
        return self._arrived


def streams_of(layout: Layout, how: str, num_layers: int, monkeypatch: pytest.MonkeyPatch) -> list[list[Post]]:
    """What each rank posts, forward and backward; layers are recomputed, and post again, or not."""
    monkeypatch.setattr(token_ring, "Messages", Posted)
    ranks, streams = tuple(range(layout.degree)), list[list[Post]]()
    for me in ranks:
        Posted.stream = []
        group: Any = "the group"
        context = AttentionContext(layout, ranks, me, group, "token_ring", KERNEL, HOST, keeps=how == "kept")

        def attention(x: torch.Tensor, k: torch.Tensor, layer: int, context: Any = context) -> Any:
            return token_ring.token_ring(x, k, k, Scores(1.0), context.at(layer))

        x, k = (torch.zeros(layout.rank_tokens[me], 1, 1, requires_grad=True) for _ in range(2))
        out = x
        for layer in range(num_layers):
            if how == "plain":
                out = attention(out, k, layer)
            else:
                out = checkpoint(attention, out, k, layer, use_reentrant=False)
        out.sum().backward()
        streams.append([post for post in Posted.stream if post])
    return streams


def expected_late(stream: Sequence[Post]) -> list[Post]:
    """The same messages of one layer, but answers are expected one post after that in which the others send them."""
    late: list[Post] = []
    waiting: Post = ()
    for post in stream:
        answers = tuple(message for message in post if message.tag % 2 and not message.sends)
        late.append((*(message for message in post if message not in answers), *waiting))
        waiting = answers
    return [post for post in (*late, waiting) if post]


LAYOUTS = [*cut_packs(30), *(scattered([40, 7, 90, 3], degree, seed) for degree in (3, 4, 8) for seed in range(6))]


@pytest.mark.parametrize("how", ["plain", "recomputed", "kept"])
def test_no_order_of_messages_is_a_circle(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward, and recompute that posts again: in every layout all messages meet their other halves."""
    for layout in LAYOUTS:
        assert not unfinished(streams_of(layout, how, 2, monkeypatch)), layout


@pytest.mark.parametrize("degree", [2, 4, 7])
def test_the_model_finds_circles(degree: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all ranks meet, and expect answers one post too late, none of them comes to an end."""
    streams = streams_of(zigzag([90], degree), "plain", 1, monkeypatch)
    assert not unfinished(streams)
    assert unfinished(list(map(expected_late, streams))) == list(range(degree))


def test_samples_held_whole_cost_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody posts anything for them."""
    assert not any(streams_of(zigzag([8, 8, 8, 8], 4), "plain", 2, monkeypatch))


def test_both_ways_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries of the round to come and answers of the one before are one batch, in forward and in backward."""
    (stream, *_) = streams_of(zigzag([800], 8), "plain", 1, monkeypatch)
    sent = [tuple(sorted(message.tag for message in post if message.sends)) for post in stream]
    # tags are twice a round's number, and one more for its answers
    one_pass = [(2,), (4,), *((2 * number + 1, 2 * number + 4) for number in range(1, 6)), (13,), (15,)]
    assert sent == 2 * one_pass
