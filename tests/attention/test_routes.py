"""What a route sends and lets meet: every pair of a query and a key before it once, and even work in every round."""

from __future__ import annotations

import pytest
import torch

from hf_hetero.attention.kernels.contract import Segments
from hf_hetero.attention.routes import RingRoute, ring_route
from hf_hetero.layout import Layout, contiguous, zigzag

CPU = torch.device("cpu")


def pairs(segments: Segments) -> int:
    """Pairs of a query and a key that meet."""
    runs = zip(segments.q_lengths, segments.k_lengths, strict=True)
    return sum(q * k - (q * (q - 1) // 2 if segments.causal else 0) for q, k in runs)


def routes_of(layout: Layout) -> list[RingRoute]:
    return [ring_route(layout, rank, CPU) for rank in range(layout.degree)]


def work(layout: Layout) -> list[list[int]]:
    """Pairs of each rank, by round; its own keys first."""
    return [
        [pairs(route.local.segments), *(0 if r.meeting is None else pairs(r.meeting.segments) for r in route.rounds)]
        for route in routes_of(layout)
    ]


@pytest.mark.parametrize("degree", [2, 3, 4, 8])
@pytest.mark.parametrize("lay_out", [zigzag, contiguous])
def test_each_pair_meets_once(degree: int, lay_out: object) -> None:
    """Each rank hears each other rank in one round, which sends what it awaits; no pair is missed or met twice."""
    layout: Layout = lay_out([61, 7, 1, 30, 64], degree)  # type: ignore[operator]
    routes = routes_of(layout)
    for rank, route in enumerate(routes):
        assert sorted([rank, *(turn.receive_from for turn in route.rounds)]) == list(range(degree))
        for turn in route.rounds:
            other = routes[turn.receive_from].rounds[turn.number - 1]
            assert other.send_to == rank
            assert turn.num_received == (0 if other.send_rows is None else len(other.send_rows))
    assert sum(map(sum, work(layout))) == sum(length * (length + 1) // 2 for length in layout.lengths)


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_a_zigzag_balances_every_round(degree: int) -> None:
    """Of one long sample, cut into 2d pieces of c tokens, every rank meets 2 c^2 pairs in each round; slices differ."""
    c = 5
    by_rank = work(zigzag([2 * degree * c], degree))
    assert by_rank == [by_rank[0]] * degree
    assert by_rank[0][1:] == [2 * c * c] * (degree - 1)
    slices = work(contiguous([2 * degree * c], degree))
    assert slices[0] != slices[-1]
