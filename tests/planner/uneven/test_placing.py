"""Groups stand where the slowest of them ends earliest."""

from __future__ import annotations

import itertools
import random

import pytest

from hf_hetero.costs.places import Place, Places
from hf_hetero.planner.uneven.placing import Load, arranged


def longest_s(loads: list[Load], starts: list[int], places: Places) -> float:
    return max(
        load.seconds(places.of(range(start, start + load.degree))) for load, start in zip(loads, starts, strict=True)
    )


@pytest.mark.parametrize("seed", range(40))
def test_groups_of_one_degree_stand_as_well_as_can_be(seed: int) -> None:
    """No order of the groups is faster, for any speeds of ranks."""
    rng = random.Random(seed)
    degree, number = rng.choice([(1, 6), (2, 5), (4, 3)])
    places = Places({rank: rng.choice([0.5, 0.7, 0.9, 1.0]) for rank in range(degree * number)}, {})
    loads = [Load(degree, rng.uniform(0, 1), rng.uniform(0, 0.2), 0.1) for _ in range(number - rng.randrange(2))]
    starts = arranged(degree * number, loads, places)
    assert len(set(starts)) == len(loads)
    blocks = range(0, degree * number, degree)
    best = min(longest_s(loads, list(order), places) for order in itertools.permutations(blocks, len(loads)))
    assert longest_s(loads, starts, places) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(40))
def test_groups_of_all_degrees_find_ranks_of_their_own(seed: int) -> None:
    """Aligned, and none twice, on any number of ranks, for any speeds of ranks and links."""
    rng = random.Random(seed)
    num_ranks = rng.choice([5, 8, 12, 16, 24])
    places = Places(
        {rank: rng.choice([0.3, 0.8, 1.0]) for rank in range(num_ranks)},
        {rank: rng.choice([0.2, 1.0]) for rank in range(num_ranks)},
    )
    degrees: list[int] = []
    while (left := num_ranks - sum(degrees)) and rng.random() < 0.9:
        degrees.append(rng.choice([d for d in (1, 2, 4, 8) if d <= left]))
    loads = [Load(d, rng.uniform(0, 1), rng.uniform(0, 1) if d > 1 else 0.0, 0.1) for d in degrees]
    starts = arranged(num_ranks, loads, places)
    assert all(start % load.degree == 0 for load, start in zip(loads, starts, strict=True))
    taken = [rank for load, start in zip(loads, starts, strict=True) for rank in range(start, start + load.degree)]
    assert len(taken) == len(set(taken))
    assert not taken or max(taken) < num_ranks


def test_by_hand() -> None:
    """The light pair takes the slow block, which leaves the fast one to the heavy pair; a slow link costs exchange."""
    heavy, light = Load(2, 1.0, 0.0, 0.0), Load(2, 0.4, 0.0, 0.0)
    assert arranged(4, [heavy, light], Places({0: 0.5}, {})) == [2, 0]
    assert arranged(4, [light, heavy], Places({3: 0.5}, {})) == [2, 0]
    chatty = Load(2, 0.1, 1.0, 0.0)
    assert arranged(4, [heavy, chatty], Places({}, {1: 0.1})) == [0, 2]
    assert chatty.seconds(Place(0.5, 0.1)) == pytest.approx(0.1 / 0.5 + 1.0 / 0.1)
    assert arranged(4, [], Places({0: 0.5}, {})) == []
