"""Sums by source are those of all ranks, whoever meets which name first."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from helpers import run_ranks

from hf_hetero.ranks.agreement import gather
from hf_hetero.ranks.by_source import MOST_SOURCES, OTHERS, SourcesOfAll, Tally
from hf_hetero.ranks.groups import GroupPool

STEPS: list[list[dict[str, Tally]]] = [  # of each step, what each rank has
    [{"web": (1.5, 3)}, {"code": (0.1, 1), "web": (1e-30, 2)}],
    [{}, {}],
    [{"web": (-2.0, 1)}, {"books": (1e300, 7)}],
    [{"code": (0.2, 4)}, {"code": (0.1, 4)}],
]
SUMS: list[dict[str, Tally]] = [
    {"web": (1.5 + 1e-30, 5), "code": (0.1, 1)},
    {},
    {"web": (-2.0, 1), "books": (1e300, 7)},
    {"code": (0.2 + 0.1, 8)},
]


def of_each_step(steps: list[list[dict[str, Tally]]]) -> tuple[list[dict[str, Tally]], list[str], int]:
    """What a rank makes of each step, the names in their order, and how often it took part in an exchange of names."""
    pool, sources, found = GroupPool((), 30, 30), SourcesOfAll(), list[dict[str, Tally]]()
    exchanges, original = 0, dist.all_gather_object

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal exchanges
        exchanges += 1
        original(*args, **kwargs)

    dist.all_gather_object = counted
    for step in steps:
        own = step[dist.get_rank()]
        found.append(sources.of_all(gather(sources.row(own), pool.control), own, pool.control))
    pool.close()
    return found, sources.names, exchanges


def test_all_ranks_have_the_sums_of_all() -> None:
    """The same on both, to the last bit; names travel only in the steps that bring new ones."""
    first, second = run_ranks(of_each_step, 2, STEPS)
    assert first == second == (SUMS, ["code", "web", "books"], 2)


def test_more_than_can_be_told_apart() -> None:
    """The first names keep their own sums; all others are one, and no target is lost."""
    sources = SourcesOfAll()
    total: dict[str, Tally] = {}
    for step in range(4):
        met = [f"address {number:03d}" for number in range(40 * step, 40 * step + 40)]
        own: dict[str, Tally] = {}
        for name in map(sources.named, met):
            before = own.get(name, (0.0, 0))
            own[name] = before[0] + 1.0, before[1] + 2
        total = sources.of_all([sources.row(own)], own, None)
        assert sum(count for _, count in total.values()) == 80
    assert len(sources.names) == MOST_SOURCES + 1
    assert total == {OTHERS: (40.0, 80)}


@pytest.mark.parametrize("value", [0.0, -0.0, 1 / 3, -1e-310, float("inf")])
def test_numbers_travel_whole(value: float) -> None:
    """A sum arrives with each of its bits."""
    sources = SourcesOfAll(["web"])
    own = {"web": (value, 1)}
    assert sources.of_all([sources.row(own)], own, None) == {"web": (value + 0.0, 1)}
