"""What a step did is told in one line, in the log, in a file, and in a summary."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_hetero import Group, MicroBatch, Plan
from hf_hetero.callbacks import PlanMetricsCallback
from hf_hetero.callbacks.plan_metrics import step_line
from hf_hetero.plan import StepReport

PLAN = Plan(2, (MicroBatch((Group((0, 1), (1,)),)), MicroBatch((Group((0,), (0,)), Group((1,), (2,))))), seconds=1.5)
REPORT = StepReport(7, PLAN, (100, 800, 100), 900, seconds=2.0, busy_s=((1.0, 1.0), (1.0, 0.5)), wait_s=0.0)
RANK_0: Any = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=9)
RANK_1: Any = SimpleNamespace(is_world_process_zero=False, global_step=0, max_steps=9)


def test_line() -> None:
    """Degrees, planned and measured seconds, tokens a second, idle share."""
    line = step_line(REPORT)
    for words in ("step    7", "[2] [1x2]", "planned   1.500 s", "measured   2.000 s", "500 tokens/s", "idle  12%"):
        assert words in line, line


def test_a_late_plan_is_said() -> None:
    """Only when it is worth a word."""
    assert "waited" not in step_line(REPORT)
    assert "waited 1.25 s for its plan" in step_line(replace(REPORT, wait_s=1.5, plan_wait_s=1.25))


def test_memory_that_ran_out_is_said(tmp_path: Path) -> None:
    """How often a step was planned anew, and the most memory that lay unused; nothing where there was none."""
    assert "memory" not in step_line(REPORT)
    assert "ran out of memory, planned anew 2x" in step_line(replace(REPORT, repeats=2))
    callback = PlanMetricsCallback()
    args: Any = SimpleNamespace(output_dir=str(tmp_path))
    callback.on_step_report(args, RANK_0, REPORT)
    assert not {"hetero/repeats", "hetero/unused_gib"} & callback.metrics().keys()
    for report in (replace(REPORT, repeats=2, unused_bytes=2**31), replace(REPORT, repeats=1, unused_bytes=2**30)):
        callback.on_step_report(args, RANK_0, report)
    logged = callback.metrics()
    assert (logged["hetero/repeats"], logged["hetero/unused_gib"]) == (3, 2)


def test_shares_of_the_peak(tmp_path: Path) -> None:
    """3 and 6 TFLOP in 2 s and 1 s of two cards of 3 TFLOP/s; nothing where the peak is not known."""
    callback, args = PlanMetricsCallback(), SimpleNamespace(output_dir=str(tmp_path))
    known = replace(REPORT, flops=3e12, peak_flops=2 * 3e12)
    assert known.mfu == pytest.approx(3 / 12)
    for report in (known, replace(known, seconds=0.75, wait_s=0.25, flops=6e12), REPORT):
        callback.on_step_report(args, RANK_0, report)  # pyright: ignore
    assert callback.metrics()["hetero/mfu"] == pytest.approx(9 / (12 + 6))
    callback.on_step_report(args, RANK_0, replace(known, peak_flops=None))  # pyright: ignore
    assert "hetero/mfu" not in callback.metrics()


def test_losses_of_routers(tmp_path: Path) -> None:
    """The mean over steps, where there are some."""
    callback, args = PlanMetricsCallback(), SimpleNamespace(output_dir=str(tmp_path))
    for value in (2.0, 3.0, None):
        callback.on_step_report(args, RANK_0, replace(REPORT, router_loss=value))  # pyright: ignore
    assert callback.metrics()["hetero/router_loss"] == 2.5
    callback.on_step_report(args, RANK_0, REPORT)  # pyright: ignore
    assert "hetero/router_loss" not in callback.metrics()


def test_metrics_since_the_last_log(tmp_path: Path) -> None:
    """The trainer's log gets means over the steps since the last one, and nothing twice."""
    callback, args = PlanMetricsCallback(), SimpleNamespace(output_dir=str(tmp_path))
    callback.on_step_report(args, RANK_0, REPORT)  # pyright: ignore
    callback.on_step_report(args, RANK_0, REPORT)  # pyright: ignore
    metrics = callback.metrics()
    assert metrics["hetero/tokens_per_s"] == pytest.approx(500)
    assert metrics["hetero/idle_share"] == pytest.approx(0.125)
    assert metrics["hetero/micro_batches"] == 2
    assert callback.metrics() == {}


def test_means_are_over_what_was_measured(tmp_path: Path) -> None:
    """Steps without an idle share, or without experts, do not count for those; the worst load is that of all steps."""
    callback, args = PlanMetricsCallback(), SimpleNamespace(output_dir=str(tmp_path))
    for load in ((1.0, 2.0), (), (3.0,)):
        callback.on_step_report(args, RANK_0, replace(REPORT, expert_load=load))  # pyright: ignore
    callback.on_step_report(args, RANK_0, replace(REPORT, is_lockstep=True))  # pyright: ignore
    metrics = callback.metrics()
    assert metrics["hetero/idle_share"] == pytest.approx(0.125)
    assert (metrics["hetero/expert_load"], metrics["hetero/expert_load_worst"]) == (2.0, 3.0)


def test_nothing_grows_without_a_log(tmp_path: Path) -> None:
    """A run that never logs keeps sums, not reports."""
    callback, args = PlanMetricsCallback(), SimpleNamespace(output_dir=str(tmp_path))
    sizes: list[int] = []
    for _ in range(3):
        for _ in range(100):
            callback.on_step_report(args, RANK_0, REPORT)  # pyright: ignore
        sizes.append(len(pickle.dumps(callback)))
    assert max(sizes) - sizes[0] < 100


def test_record_and_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 0 alone writes the record; it holds the plan in its own format; the summary counts samples by degree."""
    args: Any = SimpleNamespace(output_dir=str(tmp_path))
    for state in (RANK_0, RANK_1):
        callback = PlanMetricsCallback(lines=True, record=True)
        callback.on_train_begin(args, state, SimpleNamespace())  # pyright: ignore
        callback.on_step_report(args, state, REPORT)
        callback.on_train_end(args, state, SimpleNamespace())  # pyright: ignore
        if state is RANK_0:
            lines = (tmp_path / "plans.jsonl").read_text().splitlines()
    record = json.loads((tmp_path / "plans.jsonl").read_text())
    assert len(lines) == 1
    assert Plan.from_dict(record["plan"]) == PLAN
    assert (record["step"], record["lengths"], record["busy_s"]) == (7, [100, 800, 100], [[1.0, 1.0], [1.0, 0.5]])
    printed = capsys.readouterr().out
    assert printed.count("step    7") == 1
    assert "67% at degree 1, 33% at degree 2" in printed
    assert "1 steps, 3 samples, 1,000 tokens in 2.0 s: 500 tokens/s" in printed


def test_a_record_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once; what can be written again is, on a line of its own also after one that was cut short."""
    args: Any = SimpleNamespace(output_dir=str(tmp_path))
    callback, file = PlanMetricsCallback(record=True), tmp_path / "plans.jsonl"
    file.mkdir()
    callback.on_train_begin(args, RANK_0, SimpleNamespace())  # pyright: ignore
    for _ in range(3):
        callback.on_step_report(args, RANK_0, REPORT)
    assert caplog.text.count("cannot be written") == 1
    file.rmdir()
    file.write_text('{"step": 6, "leng')
    callback.on_step_report(args, RANK_0, REPORT)
    callback.on_step_report(args, RANK_0, replace(REPORT, step=8))
    cut, *whole = file.read_text().splitlines()
    assert cut == '{"step": 6, "leng'
    assert [json.loads(line)["step"] for line in whole] == [7, 8]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The error comes when the file is closed, and is caught there, too."""
    (tmp_path / "plans.jsonl").symlink_to("/dev/full")
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=3)
    callback = PlanMetricsCallback(record=True)
    callback.on_step_report(SimpleNamespace(output_dir=str(tmp_path)), state, REPORT)  # pyright: ignore
    assert "No space left" in caplog.text
