"""What plans did is logged as it can be computed by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from hf_hetero import Group, MicroBatch, Plan
from hf_hetero.callbacks import PlanMetricsCallback
from hf_hetero.callbacks.plan_numbers import PlanNumbers
from hf_hetero.plan import StepReport

PLAN = Plan(
    4,
    (
        MicroBatch((Group((0, 1, 2, 3), (0,), "gather"),)),
        MicroBatch((Group((0, 1), (1,), activations="recompute"), Group((2,), (2, 3)), Group((3,), ()))),
    ),
    seconds=1.5,
    lower_bound_s=1.2,
    planning_s=0.004,
)
REPORT = StepReport(
    1,
    PLAN,
    lengths=(600, 200, 100, 100),
    num_targets=996,
    seconds=1.75,
    busy_s=((1.0, 1.0, 1.0, 1.0), (0.5, 0.5, 0.75, 0.25)),
    wait_s=0.25,
    peak_bytes=3 << 30,
    static_s={1: 2.5, 2: 2.0, 4: 2.25},
    sent_bytes=1 << 29,
    by_source={"web": (100.0, 40), "code": (30.0, 60)},
)
EXPECTED = {
    "planning_ms": 4.0,
    "busy_s": 1.0 + 0.75,
    "measured_by_planned": 1.75 / 1.5,
    "gap": 1.5 / 1.2 - 1,
    "exchanged_gib": 0.5,
    "peak_gib": 3.0,
    "tokens_per_s_per_rank": 1000 / 2.0 / 4,
    "imbalance": 1.75 / ((1.5 + 1.5 + 1.75 + 1.25) / 4),  # seconds of each rank in both micro-batches
    "degree/4": 0.6,
    "degree/2": 0.2,
    "degree/1": 0.2,
    "method/gather": 0.6,
    "method/ulysses": 0.2,
    "activations/recompute": 0.2,
    "loss/web": 2.5,
    "loss/code": 0.5,
    "saved_s_by_model": 2.0 - 1.5,
    "static_degree_by_model": 2.0,
}


def logged(*reports: StepReport) -> dict[str, float]:
    numbers = PlanNumbers()
    for report in reports:
        numbers.add(report)
    return numbers.take()


def test_one_step_by_hand() -> None:
    """Each number is the one that a pencil gives, and there is no other."""
    assert logged(REPORT) == pytest.approx({f"hetero/{name}": value for name, value in EXPECTED.items()})


def test_several_steps_by_hand() -> None:
    """Ratios are of sums, losses are over the targets of all steps, memory is the most of any."""
    second = replace(
        REPORT,
        plan=replace(PLAN, seconds=0.5, lower_bound_s=0.5, planning_s=0.002),
        busy_s=((0.25,) * 4, (0.25,) * 4),
        seconds=0.5,
        wait_s=0.0,
        peak_bytes=1 << 30,
        sent_bytes=0,
        by_source={"web": (20.0, 20), "books": (9.0, 3)},
    )
    found = logged(REPORT, second)
    expected = {
        "planning_ms": 3.0,
        "measured_by_planned": (1.75 + 0.5) / 2.0,
        "gap": 2.0 / 1.7 - 1,
        "exchanged_gib": 0.25,
        "peak_gib": 3.0,
        "tokens_per_s_per_rank": 2000 / 2.5 / 4,
        "imbalance": (EXPECTED["imbalance"] + 1) / 2,
        "loss/web": 120 / 60,
        "loss/books": 3.0,
        "saved_s_by_model": (4.0 - 2.0) / 2,
    }
    assert {name: found[f"hetero/{name}"] for name in expected} == pytest.approx(expected)


def test_the_best_degree_is_of_the_whole_run() -> None:
    """A degree that did not hold some step is out; the best of the others is that of all steps, not of the last."""
    numbers = PlanNumbers()
    for static_s in ({1: 1.0, 2: 9.0, 4: 3.0}, {2: 1.0, 4: 2.0}):  # 2: 10 s, 4: 5 s, and 1 holds only the first
        numbers.add(replace(REPORT, static_s=static_s))
    numbers.take()
    numbers.add(replace(REPORT, static_s={1: 0.5, 2: 1.0, 4: 2.0}))
    found = numbers.take()
    assert found["hetero/static_degree_by_model"] == 4
    assert found["hetero/saved_s_by_model"] == pytest.approx(2.0 - 1.5)


def test_what_is_not_known_is_not_logged() -> None:
    """No memory on a CPU, no balance under sharded weights, no static run that nobody looked at, no bound."""
    bare = replace(
        REPORT,
        plan=replace(PLAN, lower_bound_s=0.0),
        peak_bytes=0,
        is_lockstep=True,
        static_s={},
        by_source={},
    )
    gone = {"peak_gib", "imbalance", "saved_s_by_model", "static_degree_by_model", "loss/web", "loss/code", "gap"}
    assert set(logged(bare)) == {f"hetero/{name}" for name in EXPECTED.keys() - gone}
    assert logged() == {}


def test_shares_stand_in_order() -> None:
    """Degrees come by their numbers, whichever was planned first: a reader looks for one of them in every log."""
    wide = Plan(16, (MicroBatch((Group(tuple(range(16)), (0, 1)),)),), seconds=1.0)
    numbers = PlanNumbers()
    for report in (replace(REPORT, plan=wide, busy_s=((1.0,) * 16,)), REPORT):
        numbers.add(report)
    shares = [name.removeprefix("hetero/degree/") for name in numbers.take() if "degree/" in name]
    assert shares == ["1", "2", "4", "16"]


def test_shares_go_on_at_zero() -> None:
    """A degree, method or policy that was there before is logged as 0 when it is not used."""
    numbers = PlanNumbers()
    numbers.add(REPORT)
    numbers.take()
    alone = Plan(4, (MicroBatch(tuple(Group((rank,), (rank,)) for rank in range(4))),), seconds=1.0)
    numbers.add(replace(REPORT, plan=alone, busy_s=((1.0,) * 4,)))
    found = numbers.take()
    assert found["hetero/degree/1"] == 1
    assert [found[f"hetero/{name}"] for name in ("degree/4", "method/gather", "activations/recompute")] == [0, 0, 0]


def test_they_come_through_the_callback() -> None:
    """The trainer's log gets them beside the others, once."""
    callback, args, state = PlanMetricsCallback(), SimpleNamespace(output_dir="."), SimpleNamespace()
    state.is_world_process_zero = False
    callback.on_step_report(args, state, REPORT)  # pyright: ignore
    found: dict[str, Any] = callback.metrics()
    assert found["hetero/loss/web"] == 2.5
    assert found["hetero/tokens_per_s"] == pytest.approx(500)
    assert callback.metrics() == {}
