"""A run learns which of its ranks are slow, from groups that hide who of them is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hf_hetero import CostModel, Group, MicroBatch, Plan
from hf_hetero.callbacks import RankSpeedsCallback
from hf_hetero.callbacks.rank_speeds import UNEVEN_COST_MODEL
from hf_hetero.callbacks.refitting import scaled
from hf_hetero.plan import StepReport

SHAPES = [[(0, 1, 2, 3)], [(0, 1), (2, 3)], [(0, 1), (2,), (3,)], [(0,), (1,), (2,), (3,)], [(0,), (1,), (2, 3)]]
COST = CostModel(1e-7, 1e-5, 1e-3, 1000, {2: 1e9, 4: 1e9}, 1, 0, 1e6, provenance="measured")


def report(
    number: int,
    truth: CostModel,
    rng: random.Random,
    shapes: Sequence[Any] = SHAPES,
    off: float = 1.0,
    num_ranks: int = 4,
    **changes: Any,
) -> StepReport:
    """A step whose groups take what another cost model says, up to a few percent."""
    shape = rng.choice(list(shapes))
    lengths = tuple(rng.randrange(500, 3000) for _ in shape)
    groups = tuple(Group(ranks, (sample,)) for sample, ranks in enumerate(shape))
    busy = [0.0] * num_ranks
    for group in groups:
        for rank in group.ranks:
            busy[rank] = off * truth.group_seconds(group, lengths) * rng.uniform(0.98, 1.0)
    plan = Plan(num_ranks, (MicroBatch(groups),))
    return StepReport(number, plan, lengths, 99, max(busy), (tuple(busy),), **changes)


def learned(
    folder: Path,
    truth: CostModel,
    cost: CostModel = COST,
    steps: int = 60,
    callback: RankSpeedsCallback | None = None,
    first: bool = True,
    **changes: Any,
) -> CostModel:
    """The cost model that a run ends with."""
    callback, rng = callback or RankSpeedsCallback(), random.Random(5)
    args: Any = SimpleNamespace(output_dir=str(folder))
    state: Any = SimpleNamespace(is_world_process_zero=first)
    for number in range(1, steps + 1):
        callback.on_step_report(args, state, report(number, truth, rng, **changes))
        cost = callback.recalibrated(cost) or cost
    return cost


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("off", [1.0, 4.0])
def test_a_slow_rank_is_found_and_its_companions_are_not_blamed(tmp_path: Path, rank: int, off: float) -> None:
    """It computes at 0.6; whatever all are off by together, the cost model says so, and the file is the same."""
    found = learned(tmp_path, replace(COST, rank_speeds={rank: 0.6}), off=off)
    assert set(found.rank_speeds) == {rank}
    assert found.rank_speeds[rank] == pytest.approx(0.6, abs=0.04)
    assert found.provenance == "refitted"
    assert found.source == "; speeds of ranks from measured steps"
    assert CostModel.load(tmp_path / UNEVEN_COST_MODEL) == replace(found, provenance="measured")
    assert replace(found, rank_speeds={}, source="", provenance="measured") == COST


def test_what_is_exchanged_is_no_slowness() -> None:
    """A control: where exchange is most of a group's time, its ratio alone would make a slow rank a faster one."""
    dear = replace(COST, all_to_all_bytes_per_token=3e5)
    truth = replace(dear, rank_speeds={2: 0.5})
    group, lengths = Group((2, 3), (0,)), (2000,)
    ratio = truth.group_seconds(group, lengths) / dear.group_seconds(group, lengths)
    assert ratio < 1.5
    found = learned(Path(), truth, dear, shapes=SHAPES[1:3], first=False)
    assert found.rank_speeds[2] == pytest.approx(0.5, abs=0.05)


def test_nobody_is_found_where_all_are_alike(tmp_path: Path) -> None:
    """Nor for a few percent, nor where all wait for the slowest in each layer; no file is written."""
    assert learned(tmp_path, COST, off=3.0) == COST
    assert learned(tmp_path, replace(COST, rank_speeds={1: 0.95})) == COST
    assert learned(tmp_path, replace(COST, rank_speeds={1: 0.3}), is_lockstep=True) == COST
    assert not list(tmp_path.iterdir())


def test_ranks_that_always_share_are_slow_together(tmp_path: Path) -> None:
    """Nobody can tell them apart, and no plan of such groups needs to."""
    found = learned(tmp_path, replace(COST, rank_speeds={2: 0.5}), shapes=[SHAPES[1], [(0,), (1,), (2, 3)]])
    assert found.rank_speeds == {2: pytest.approx(0.5, abs=0.04), 3: pytest.approx(0.5, abs=0.04)}


def test_a_rank_that_recovers_gets_its_speed_back(tmp_path: Path) -> None:
    """And one that gets slower still, less."""
    slow = replace(COST, rank_speeds={1: 0.5})
    assert learned(tmp_path, COST, slow).rank_speeds == {}
    assert learned(tmp_path, replace(COST, rank_speeds={1: 0.3}), slow).rank_speeds == {1: pytest.approx(0.3, abs=0.03)}


def test_full_speed_is_that_of_the_fastest(tmp_path: Path) -> None:
    """Where one rank is faster than all others, their speeds are shares of its own; times are a refit's to mend."""
    truth = replace(scaled(COST, np.array([0.5, 0.5, 1.0, 1.0])), rank_speeds={1: 0.5, 2: 0.5, 3: 0.5})
    found = learned(tmp_path, truth)
    assert found.rank_speeds == {rank: pytest.approx(0.5, abs=0.05) for rank in (1, 2, 3)}
    assert replace(found, rank_speeds={}, source="", provenance="measured") == COST


def test_two_ranks(tmp_path: Path) -> None:
    """One of two ranks is slow: the other has full speed, though none is like most."""
    both = [[(0,), (1,)], [(0, 1)]]
    found = learned(tmp_path, replace(COST, rank_speeds={0: 0.4}), shapes=both, num_ranks=2)
    assert found.rank_speeds == {0: pytest.approx(0.4, abs=0.03)}


def test_a_run_may_only_be_offered_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without `adopt` its plans stay; what it is told is told once, with the steps and where the file is."""
    truth = replace(COST, rank_speeds={3: 0.5})
    assert learned(tmp_path, truth, callback=RankSpeedsCallback(adopt=False, every_steps=15)) == COST
    assert CostModel.load(tmp_path / UNEVEN_COST_MODEL).rank_speeds == {3: pytest.approx(0.5, abs=0.04)}
    assert "by steps 4 to 18: rank 3: 0.5" in caplog.text
    assert "This run does not plan by them" in caplog.text
    assert UNEVEN_COST_MODEL in caplog.text


def test_a_file_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run plans by the speeds all the same."""
    (tmp_path / "file").write_text("")
    assert learned(tmp_path / "file", replace(COST, rank_speeds={3: 0.5})).rank_speeds
    assert "cannot be written" in caplog.text
    assert learned(tmp_path / "other", replace(COST, rank_speeds={3: 0.5}), first=False).rank_speeds
    assert not (tmp_path / "other").exists()
