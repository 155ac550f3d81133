"""A plan that breaks a law cannot be made; one that can be made survives a round trip."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hf_hetero import Group, HeteroError, MicroBatch, Plan
from hf_hetero.plan import StepReport, idle_share
from hf_hetero.plan_in_words import describe_degrees


def mixed_plan(**changes: Any) -> Plan:
    first = MicroBatch((Group((0, 1), (3, 0)), Group((2,), (1,)), Group((3,), ())))
    second = MicroBatch((Group((0, 1, 2, 3), (2,)),))
    options: dict[str, Any] = {"seconds": 1.05, "lower_bound_s": 1.0, "solver": "fast", "planning_s": 0.001}
    return Plan(4, (first, second), **{**options, **changes})


def test_round_trip() -> None:
    """to_dict is JSON of the documented format, and from_dict gives the same plan back."""
    plan = mixed_plan()
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["format"] == "hf-hetero-plan/1"
    assert data["micro_batches"][0]["groups"][0] == {"ranks": [0, 1], "samples": [3, 0], "method": "ulysses"}
    assert set(data) == {"format", "num_ranks", "micro_batches", "seconds", "lower_bound_s", "solver", "planning_s"}
    assert Plan.from_dict(data) == plan


def test_share_has_one_group_a_micro_batch() -> None:
    """Every rank takes part in every micro-batch, with samples or without."""
    assert [group.samples for group in mixed_plan().share(3)] == [(), (2,)]
    assert [group.degree for group in mixed_plan().share(1)] == [2, 4]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [((), "no ranks"), ((0, 2), "contiguous"), ((1, 2), "multiple of 2"), ((1, 0), "contiguous"), ((2, 3, 4), "of 3")],
)
def test_groups_are_aligned(ranks: tuple[int, ...], message: str) -> None:
    """Ranks of a group are contiguous, ascending, and start at a multiple of their number."""
    with pytest.raises(HeteroError, match=message):
        Group(ranks, ())


@pytest.mark.parametrize("groups", [[(0, 1)], [(0, 1), (2,)], [(0, 1), (0, 1), (2, 3)], [(0, 1), (2, 3), (4,)]])
def test_groups_partition_the_ranks(groups: list[tuple[int, ...]]) -> None:
    """A rank missing from a micro-batch, or in it twice, would hang the others."""
    with pytest.raises(HeteroError, match="must partition the 4 ranks"):
        Plan(4, (MicroBatch(tuple(Group(ranks, ()) for ranks in groups)),))


@pytest.mark.parametrize("samples", [(0, 0), (1,), (0, 2)])
def test_each_sample_once(samples: tuple[int, ...]) -> None:
    """A sample dropped or repeated is refused."""
    with pytest.raises(HeteroError, match="exactly once"):
        Plan(1, (MicroBatch((Group((0,), samples),)),))


def test_unknown_format() -> None:
    """A file of another format is refused by name."""
    with pytest.raises(HeteroError, match="'hf-hetero-plan/9'"):
        Plan.from_dict({**mixed_plan().to_dict(), "format": "hf-hetero-plan/9"})


def test_digest_sees_decisions_and_nothing_else() -> None:
    """Two ranks compare what is trained and how, not how long the plan took."""
    assert mixed_plan().digest() == mixed_plan(planning_s=9.0, seconds=2.0).digest()
    other = mixed_plan().to_dict()
    other["micro_batches"][0]["groups"][0]["samples"] = [0, 3]
    assert Plan.from_dict(other).digest() != mixed_plan().digest()


def test_what_groups_do_to_hold_more_travels() -> None:
    """It is in the file where a group does something, and in the digest; what nobody knows is refused."""
    plan = mixed_plan().to_dict()
    assert "activations" not in plan["micro_batches"][0]["groups"][0]
    plan["micro_batches"][0]["groups"][0]["activations"] = "recompute"
    read = Plan.from_dict(plan)
    assert [group.activations for group in read.groups] == ["recompute", None, None, None]
    assert Plan.from_dict(read.to_dict()) == read
    assert read.digest() != mixed_plan().digest()
    with pytest.raises(HeteroError, match="activations 'forget' is none of"):
        Group((0,), (), activations="forget")


def test_gap_and_degrees() -> None:
    """A plan says how far from the bound it is, and reads in one line."""
    assert mixed_plan().gap == pytest.approx(0.05)
    assert describe_degrees(mixed_plan()) == "[2 1x2] [4]"
    marked = (Group((0, 1), (0,), activations="recompute"), Group((2,), (1,), activations="offload"), Group((3,), ()))
    assert describe_degrees(Plan(4, (MicroBatch(marked),))) == "[2r 1o 1]"
    assert Plan(1, ()).gap == 0


def test_idle_share() -> None:
    """Idle is what ranks wait for the slowest of their micro-batch."""
    assert idle_share([[1.0, 1.0], [2.0, 0.0]]) == pytest.approx(1 - 4 / 6)
    assert idle_share([]) == 0


def test_report_counts_waiting() -> None:
    """Tokens a second include the wait for the plan."""
    report = StepReport(3, mixed_plan(), (10, 20, 30, 40), 90, seconds=1.5, busy_s=((1.0,) * 4,), wait_s=0.5)
    assert report.num_tokens == 100
    assert report.tokens_per_s == pytest.approx(50)
    assert report.idle_share == 0
