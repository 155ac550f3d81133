"""A planner in a process of its own, so that planning takes no time from the interpreter that trains.

The process is started by name, not by `multiprocessing`, which would run the user's script again. It talks in lines of
JSON, ignores Ctrl+C, and ends when its input does: with its owner, however that ends.
"""

from __future__ import annotations

import json
import operator
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any

from hf_hetero import errors
from hf_hetero.cost_model import CostModel
from hf_hetero.errors import HeteroError
from hf_hetero.plan import Plan
from hf_hetero.planner.planner import Planner


class PlannerProcess:
    """Plans as a `Planner` does, elsewhere. Calls wait for each other; the process starts with the first.

    Args:
        planner: asked anew for each call, because its cost model may have been refitted.
        niceness: how far the process steps back where cores are scarce, 0 to 19.
    """

    def __init__(self, planner: Callable[[], Planner], niceness: int = 0) -> None:
        self._planner, self._niceness = planner, niceness
        self._process: subprocess.Popen[str] | None = None
        self._turn = threading.Lock()
        self._closed = False

    def plan(self, lengths: Sequence[int]) -> Plan:
        """As `Planner.plan`.

        Raises:
            HeteroError: what the planner raised, or that its process has ended.
        """
        return self._ask({"verb": "plan", "lengths": list(lengths)})

    def improve(self, plan: Plan, lengths: Sequence[int]) -> Plan:
        """As `Planner.improve`.

        Raises:
            HeteroError: as `plan`.
        """
        return self._ask({"verb": "improve", "lengths": list(lengths), "plan": plan.to_dict()})

    def start(self) -> None:
        """Have the process ready before the first call."""
        with self._turn:
            self._running()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()  # a call that waits for it gets the end of its output
            with self._turn:
                _ended(process)

    def _ask(self, question: dict[str, Any]) -> Plan:
        line = json.dumps({**question, "planner": _settings(self._planner())}, default=operator.index)
        with self._turn:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:
                answer = ""
            if not answer:
                raise RuntimeError(f"The planner's process ended with code {_ended(process)}.")
        found = json.loads(answer)
        if "plan" in found:
            return Plan.from_dict(found["plan"])
        kind = getattr(errors, found["error"], None)
        if isinstance(kind, type) and issubclass(kind, HeteroError):
            raise kind(found["text"])
        raise RuntimeError(f"{found['error']} in the planner's process: {found['text']}")

    def _running(self) -> subprocess.Popen[str]:
        if self._closed:
            raise RuntimeError("The planner's process was closed.")
        if self._process is None or self._process.poll() is not None:
            paths = os.pathsep.join(path for path in sys.path if path)
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from hf_hetero.planner.process import main; main()", str(self._niceness)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        return self._process


def _ended(process: subprocess.Popen[str]) -> int:
    """Wait for the process, close its pipes; returns its exit code."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # a question that nobody read any more
                pipe.close()
    return process.wait()


def _settings(planner: Planner) -> dict[str, Any]:
    return {
        "cost_model": planner.cost_model.to_dict(),
        "num_ranks": planner.num_ranks,
        "max_degree": planner.max_degree,
        "solver": planner.solver,
        "mip_time_limit_s": planner.mip_time_limit_s,
        "mip_backend": planner.mip_backend,
        "methods": list(planner.methods),
    }


def answered(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to one line: a plan, or the name and text of an error."""
    try:
        settings = dict(question["planner"])
        planner = Planner(CostModel.from_dict(settings.pop("cost_model")), **settings)
        if question["verb"] == "improve":
            plan = planner.improve(Plan.from_dict(question["plan"]), question["lengths"])
        else:
            plan = planner.plan(question["lengths"])
        return {"plan": plan.to_dict()}
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error)}


def serve(questions: IO[str], answers: IO[str]) -> None:
    """Answer line by line until the input ends."""
    for line in questions:
        answers.write(json.dumps(answered(json.loads(line))) + "\n")
        answers.flush()


def main() -> None:
    """The process itself; its argument is its niceness."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a solver prints must not be taken for an answer
    serve(sys.stdin, answers)
