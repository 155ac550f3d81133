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

import numpy as np
import pytest
from planner.reference import small_cost

from hf_hetero.errors import BadSample
from hf_hetero.planner import Planner, PlannerProcess
from hf_hetero.planner.process import serve

LENGTHS = [390, 250, 60, 50, 50, 40, 30, 20, 7, 1]
PLANNER = Planner(small_cost(100, (2, 4)), 4, mip_time_limit_s=1.0)


@pytest.fixture
def process() -> Iterator[PlannerProcess]:
    process = PlannerProcess(lambda: PLANNER, niceness=1)
    yield process
    process.close()


def running(process: PlannerProcess) -> subprocess.Popen[str]:
    assert process._process is not None
    return process._process


def test_it_plans_as_the_planner_does(process: PlannerProcess) -> None:
    """The same plan to the last bit, also from numpy's integers; improvements too."""
    plan = process.plan(np.array(LENGTHS))
    here = PLANNER.plan(LENGTHS)
    assert replace(plan, planning_s=here.planning_s) == here
    assert process.improve(plan, LENGTHS).seconds <= plan.seconds


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


def test_it_ends_with_its_owner() -> None:
    """An owner that is killed closes the pipe, and the process ends."""
    script = (
        "import time; from planner.test_process import PLANNER, LENGTHS; from hf_hetero.planner import PlannerProcess;"
        "p = PlannerProcess(lambda: PLANNER); p.plan(LENGTHS); print(p._process.pid, flush=True); time.sleep(60)"
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
    for _ in range(200):
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
    serve(io.StringIO(json.dumps({"verb": "plan"}) + "\n" + json.dumps({"verb": "plan"}) + "\n"), answers)
    lines = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert [line["error"] for line in lines] == ["KeyError", "KeyError"]
