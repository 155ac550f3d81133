"""A slow rank is named, whatever is planned, and nobody else is."""

from __future__ import annotations

import random
import sys
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hf_hetero import Group, MicroBatch, Plan
from hf_hetero.callbacks import PlanMetricsCallback
from hf_hetero.callbacks.stragglers import Stragglers
from hf_hetero.plan import StepReport

SHAPES = [[(0, 1, 2, 3)], [(0, 1), (2, 3)], [(0, 1), (2,), (3,)], [(0,), (1,), (2,), (3,)], [(0,), (1,), (2, 3)]]


def step(rng: random.Random, slow: dict[int, float], off: float = 1.0, **changes: Any) -> StepReport:
    """Random groups; each takes what it was planned to take, times `off`, times what its slowest rank is slower by."""
    shape = rng.choice(SHAPES)
    micro_batch = MicroBatch(tuple(Group(ranks, (number,)) for number, ranks in enumerate(shape)))
    busy, planned = [0.0] * 4, [0.0] * 4
    for ranks in shape:
        seconds = rng.uniform(0.1, 1.0)
        for rank in ranks:
            planned[rank] = seconds
            busy[rank] = off * seconds * max(slow.get(r, 1.0) for r in ranks) * rng.uniform(0.95, 1.05)
    lengths = (100,) * len(shape)
    return StepReport(
        1, Plan(4, (micro_batch,)), lengths, 99, max(busy), (tuple(busy),), planned_s=(tuple(planned),), **changes
    )


def told(slow: dict[int, float], num_steps: int = 60, seed: int = 0, **changes: Any) -> list[str]:
    stragglers, rng, words = Stragglers(), random.Random(seed), list[str]()
    for _ in range(num_steps):
        stragglers.add(step(rng, slow, **changes))
        if said := stragglers.words():
            words.append(said)
    return words


@pytest.mark.parametrize("off", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("rank", range(4))
def test_a_slow_rank_is_named(rank: int, off: float) -> None:
    """Whatever the cost model is off by for all, and once for as long as it stays slow."""
    words = told({rank: 2.0}, off=off)
    assert words
    assert f"rank {rank} takes" in words[0]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("slower", [3.0, 9.0, 40.0])
def test_companions_of_a_slow_rank_are_not_named(slower: float, seed: int) -> None:
    """They wait for it in the groups that they share, and are as fast as others in those that they do not."""
    words = told({2: slower}, seed=seed)
    assert words
    assert all("rank 2 takes" in said and said.count(" takes ") == 1 for said in words)


def test_two_slow_ranks_that_share_groups_are_both_named() -> None:
    """Each of them is slow in groups without the other, too."""
    assert all(f"rank {rank} takes" in told({2: 3.0, 3: 2.0})[0] for rank in (2, 3))


def test_who_is_never_seen_apart_is_named_together() -> None:
    """Two ranks that share all their groups: nobody can tell which of them it is."""
    stragglers = Stragglers(num_steps=2)
    plan = Plan(4, (MicroBatch((Group((0, 1), (0,)), Group((2, 3), (1,)))),))
    for number in (1, 2):
        busy = (1.0, 1.0, 3.0, 3.1)
        stragglers.add(StepReport(number, plan, (1, 1), 1, 1.0, (busy,), planned_s=((1.0, 1.0, 1.0, 1.0),)))
    said = stragglers.words()
    assert "rank 2 takes 3.00" in said
    assert "rank 3 takes 3.10" in said


def test_a_rank_that_degrades_is_named_with_its_evidence() -> None:
    """Which steps, what was planned and measured of it in them, and what it was in those before."""
    stragglers, words = Stragglers(num_steps=4), list[str]()
    plan = Plan(3, (MicroBatch(tuple(Group((rank,), (rank,)) for rank in range(3))),))
    for number in range(11, 23):
        busy = (1.0, 1.0, 3.0 if number > 18 else 1.0)
        report = StepReport(number, plan, (1, 1, 1), 1, 1.0, (busy,), planned_s=((0.5, 0.5, 0.5),))
        stragglers.add(report)
        words.append(stragglers.words())
    (said,) = filter(None, words)
    assert words[-1] == said
    assert said.startswith("In steps 19 to 22, ")
    assert "rank 2 takes 3.00 times as long (2 s planned, 12 s measured; 1.00 times in steps 15 to 18)" in said
    assert "RankSpeedsCallback" in said


@pytest.mark.parametrize("seed", range(10))
def test_nobody_is_named_where_all_are_alike(seed: int) -> None:
    """Nor for a few percent, nor for a cost model that is wrong."""
    assert not told({}, seed=seed, off=3.0)
    assert not told({1: 1.05}, seed=seed)


def test_a_single_step_names_nobody() -> None:
    """A rank that was disturbed once is no straggler."""
    stragglers, rng = Stragglers(), random.Random(3)
    for number in range(40):
        stragglers.add(step(rng, {2: 3.0} if number == 25 else {}))
        assert not stragglers.words()


def test_ranks_in_step_tell_nothing() -> None:
    """Where sharded weights have all ranks wait in each layer, or nothing has a price, nothing is said."""
    assert not told({1: 9.0}, is_lockstep=True)
    stragglers, rng = Stragglers(), random.Random(0)
    for _ in range(40):
        report = step(rng, {1: 9.0})
        stragglers.add(StepReport(1, report.plan, report.lengths, 99, 1.0, report.busy_s))
        assert not stragglers.words()
    assert not stragglers.slowdowns()


def test_the_ratio_by_hand() -> None:
    """Each rank's seconds by its plan's, by the median of what the others have."""
    stragglers = Stragglers()
    plan = Plan(3, (MicroBatch(tuple(Group((rank,), (rank,)) for rank in range(3))),))
    stragglers.add(StepReport(1, plan, (1, 1, 1), 1, 1.0, ((1.0, 1.0, 6.0),), planned_s=((1.0, 2.0, 3.0),)))
    assert stragglers.slowdowns() == pytest.approx([1.0 / 1.25, 0.5 / 1.5, 2.0 / 0.75])


@pytest.mark.parametrize("num_ranks", range(2, 9))
def test_the_median_is_of_the_others(num_ranks: int) -> None:
    """Whatever the number of ranks, and where some are alike, as `statistics` has it."""
    rng = random.Random(num_ranks)
    for _ in range(20):
        measured = [float(rng.randrange(1, 5)) for _ in range(num_ranks)]
        plan = Plan(num_ranks, (MicroBatch(tuple(Group((rank,), (rank,)) for rank in range(num_ranks))),))
        stragglers = Stragglers()
        planned = ((1.0,) * num_ranks,)
        stragglers.add(StepReport(1, plan, (1,) * num_ranks, 1, 1.0, (tuple(measured),), planned_s=planned))
        others = [median(measured[:rank] + measured[rank + 1 :]) for rank in range(num_ranks)]
        expected = [seconds / other for seconds, other in zip(measured, others, strict=True)]
        assert stragglers.slowdowns() == pytest.approx(expected)


@pytest.mark.parametrize("breaks", [False, True])
def test_trackio_is_told_where_it_is_the_tracker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, breaks: bool
) -> None:
    """By rank 0, once, as a warning; a tracker that cannot be told ends no run; others are not looked for."""
    alerts: list[dict[str, Any]] = []

    def alert(**what: Any) -> None:
        alerts.append(what)
        if breaks:
            raise ConnectionError("no server")

    fake: Any = ModuleType("trackio")
    fake.alert, fake.AlertLevel = alert, SimpleNamespace(WARN="warn")
    monkeypatch.setitem(sys.modules, "trackio", fake)
    for report_to, is_first in (([], True), (["trackio"], False), (["trackio"], True)):
        args: Any = SimpleNamespace(output_dir=".", report_to=report_to)
        state: Any = SimpleNamespace(is_world_process_zero=is_first)
        callback, rng = PlanMetricsCallback(), random.Random(1)
        for _ in range(25):
            callback.on_step_report(args, state, step(rng, {3: 2.0}))
    assert [what["level"] for what in alerts] == ["warn"]
    assert "rank 3 takes" in alerts[0]["text"]
    assert caplog.text.count("rank 3 takes") == 2
    assert ("trackio could not be told: ConnectionError" in caplog.text) == breaks
    assert callback.metrics()["hetero/slowest_rank"] > 1.25
