"""A step's fingerprint covers all that ranks must agree on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import ScriptedPlanner

from hf_hetero import Group, MicroBatch, Plan
from hf_hetero.samples.samples import Drawn
from hf_hetero.step import Step, StepShare

LENGTHS = (5, 9, 2, 7)
DRAWN = Drawn((10, 11, 12, 12), (0, 0, 0, 2), LENGTHS, (5, 9, 9, 9))
STEP = Step(1, 3, DRAWN, ScriptedPlanner(4).plan(LENGTHS))


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 2},
        {"index": 4},
        {"drawn": replace(DRAWN, rows=(10, 11, 13, 12))},
        {"drawn": replace(DRAWN, lengths=(5, 9, 7, 2))},
        {"drawn": replace(DRAWN, starts=(0, 0, 2, 0))},
        {"plan": ScriptedPlanner(4).plan((5, 9, 2, 8))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_digest_covers(change: dict[str, object]) -> None:
    """Another epoch, step, row, length or plan is another fingerprint; how long one waited is not."""
    assert replace(STEP, **change).digest() != STEP.digest()  # pyright: ignore
    assert replace(STEP, wait_s=3.0).digest() == STEP.digest()
    assert 0 <= STEP.digest() < 2**63


def test_shares_cover_the_step() -> None:
    """Every sample is held by some rank."""
    assert set().union(*(StepShare(STEP, rank).samples() for rank in range(4))) == {0, 1, 2, 3}


def test_shared_rows() -> None:
    """Rows in a group of several ranks, and rows whose parts lie in several groups; not those of one rank."""
    groups = (Group((0, 1), (0,)), Group((2,), (1, 2)), Group((3,), (3,)))
    plan = Plan(4, (MicroBatch(groups),))
    assert replace(STEP, plan=plan).shared_rows() == (10, 12)


def test_towers_are_no_part_of_a_digest() -> None:
    """What images take decides a plan, and is known where it is made: ranks are told the plan by its own digest."""
    seeing = replace(STEP, drawn=replace(DRAWN, tower_tokens=(0.0, 7.5, 0.0, 0.0)), as_text=(5, 17, 2, 7))
    assert seeing.digest() == STEP.digest()
    assert STEP.planned_lengths == seeing.lengths == LENGTHS
    assert seeing.planned_lengths == (5, 17, 2, 7)
