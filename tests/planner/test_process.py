"""Laws of the planner's process: the same plans, the same errors, and nothing left behind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planner.reference import small_cost

from hf_hetero.errors import BadSample
from hf_hetero.planner import Planner, PlannerLost, PlannerProcess
from hf_hetero.planner.process import serve

LENGTHS = [390, 250, 60, 50, 50, 40, 30, 20, 7, 1]
PLANNER = Planner(small_cost(100, (2, 4)), 4, mip_time_limit_s=1.0)


@pytest.fixture
def process() -> Iterator[PlannerProcess]:
    process = PlannerProcess(lambda: PLANNER, niceness=1)
    yield process
    process.close()


def running(process: PlannerProcess) -> subprocess.Popen[bytes]:
    assert process._process is not None
    return process._process


def test_it_plans_as_the_planner_does(process: PlannerProcess) -> None:
    """The same plan to the last bit, also from numpy's integers; improvements too."""
    plan = process.plan(np.array(LENGTHS))
    here = PLANNER.plan(LENGTHS)
    assert replace(plan, planning_s=here.planning_s) == here
    assert process.improve(plan, LENGTHS).seconds <= plan.seconds


def test_static_runs_are_told_as_the_planner_plans_them(process: PlannerProcess) -> None:
    """Each degree that holds the longest sample, and no other, with the seconds of its static plan."""
    found = process.static_seconds(LENGTHS)
    assert found == {4: PLANNER.static(LENGTHS, 4).seconds}  # 390 tokens ask for four ranks of 100
    shorter = [n for n in LENGTHS if n <= 90]
    assert process.static_seconds(shorter) == {d: PLANNER.static(shorter, d).seconds for d in (1, 2, 4)}


def test_errors_keep_their_kind(process: PlannerProcess) -> None:
    """What the planner refuses is refused in the same words, and the process goes on."""
    with pytest.raises(BadSample, match="sample 1 has length 0"):
        process.plan([3, 0])
    assert process.plan([3]).num_samples == 1


def test_a_process_that_dies_is_replaced(process: PlannerProcess) -> None:
    """The call says how it ended; the next one has a new process."""
    process.start()
    first = running(process)
    first.send_signal(signal.SIGSTOP)  # it will not answer
    threading.Timer(0.5, first.kill).start()
    with pytest.raises(RuntimeError, match="ended with code -9"):
        process.plan(LENGTHS)
    assert process.plan(LENGTHS).num_samples == len(LENGTHS)
    assert running(process).pid != first.pid


def test_ctrl_c_is_for_the_training_process(process: PlannerProcess) -> None:
    """It reaches every process of the terminal; this one goes on until it is closed."""
    process.plan(LENGTHS)
    os.kill(running(process).pid, signal.SIGINT)
    assert process.plan(LENGTHS).num_samples == len(LENGTHS)


IDLE = "p = PlannerProcess(lambda: PLANNER); p.plan(LENGTHS)"
BUSY = (
    "many = [100 + 7 * i % 290 for i in range(300)]; slow = replace(PLANNER, mip_time_limit_s=60.0);"
    "p = PlannerProcess(lambda: slow); plan = p.plan(many);"
    "threading.Thread(target=p.improve, args=(plan, many), daemon=True).start(); time.sleep(1)"
)


@pytest.mark.parametrize("doing", [IDLE, BUSY], ids=["idle", "improving"])
def test_it_ends_with_its_owner(doing: str) -> None:
    """However its owner is killed, the process ends: when its input does, or within seconds while it is at work."""
    script = (
        "import threading, time; from dataclasses import replace; from planner.test_process import PLANNER, LENGTHS;"
        f"from hf_hetero.planner import PlannerProcess; {doing}; print(p._process.pid, flush=True); time.sleep(60)"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    owner = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert owner.stdout is not None
    with owner.stdout:
        pid = int(owner.stdout.readline())
        owner.kill()
        owner.wait()
    until = time.monotonic() + 60  # it steps back for all else
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return  # ended, and waits for whoever adopted it
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.05)
    pytest.fail("the planner's process outlived its owner")


def test_lines_in_lines_out() -> None:
    """One answer a question; what is wrong with one does not end the rest."""
    answers = io.StringIO()
    serve(io.StringIO("".join(json.dumps({"verb": "plan", "number": n}) + "\n" for n in (4, 5))), answers)
    lines = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert [(line["error"], line["number"]) for line in lines] == [("KeyError", 4), ("KeyError", 5)]


def test_a_process_that_hangs_is_replaced() -> None:
    """A question that is not answered in time, long or short, ends the process; the next question has a new one."""
    process = PlannerProcess(lambda: PLANNER, limit_s=120)
    process.start()
    first = running(process)
    assert process.plan(LENGTHS).num_samples == len(LENGTHS)
    process._limit_s = 0.5
    first.send_signal(signal.SIGSTOP)
    for lengths in (LENGTHS, [1] * 200_000):  # more than a pipe holds
        with pytest.raises(PlannerLost, match=r"no answer within 0.5 s .*planning_timeout_s"):
            process.plan(lengths)
        assert first.poll() is not None
        process._limit_s = 120
        assert process.plan(LENGTHS).num_samples == len(LENGTHS)
        first, process._limit_s = running(process), 0.5
        first.send_signal(signal.SIGSTOP)
    process.close()
    assert first.poll() is not None


@pytest.mark.parametrize("where", ["before", "while"])
def test_what_is_printed_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """An interpreter that greets, before or while it plans, changes no plan."""
    greeting = "print('Welcome to the cluster')\n"
    if where == "while":
        greeting = "import json\nloads = json.loads\njson.loads = lambda *a: (print('{}', flush=True), loads(*a))[1]\n"
    (tmp_path / "sitecustomize.py").write_text(greeting)
    monkeypatch.syspath_prepend(str(tmp_path))
    process = PlannerProcess(lambda: PLANNER)
    for lengths in (LENGTHS, [3], [5, 5]):
        assert process.plan(lengths).micro_batches == PLANNER.plan(lengths).micro_batches
    process.close()


def test_an_answer_to_another_question_is_none(process: PlannerProcess) -> None:
    """It is said, and the process is replaced."""
    process.start()
    numbers = iter([7])
    ask = process._exchanged
    process._exchanged = lambda *args: json.dumps({**json.loads(ask(*args)), "number": next(numbers)}).encode()
    with pytest.raises(PlannerLost, match="answered question 7 instead of 1"):
        process.plan(LENGTHS)
    process._exchanged = ask
    assert process.plan(LENGTHS).num_samples == len(LENGTHS)


def test_nothing_of_the_current_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files there that are named like modules stay files."""
    for name in ("json", "statistics", "numpy", "operator", "selectors"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise ImportError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    process = PlannerProcess(lambda: PLANNER)
    assert process.plan(LENGTHS).num_samples == len(LENGTHS)
    process.close()
    assert not (tmp_path / "ran").exists()
