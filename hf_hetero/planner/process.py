"""This module plans in a process of its own, so that planning takes no time from the interpreter that trains.

The process is started by name, not by `multiprocessing`, which would run the user's script again. It talks in lines of
JSON, ignores Ctrl+C, and ends when its input does: with its owner, however that ends.

Answers come through a pipe of their own and carry the number of their question: whatever an interpreter of a cluster
greets with, or a solver prints, is not taken for a plan. Nothing is imported from the current folder. A question that
is not answered within a limit ends the process; the next one has a new process.
"""

from __future__ import annotations

import json
import operator
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

from hf_hetero import errors
from hf_hetero.costs import CostModel
from hf_hetero.errors import HeteroError
from hf_hetero.plan import Plan
from hf_hetero.planner.items import Lengths
from hf_hetero.planner.planner import Planner

START = "import sys; sys.path[:] = filter(None, sys.path); from hf_hetero.planner.process import main; main()"
"""`-c` puts the current folder first into the path, where a file may be named like a module of Python."""
LOOK_S = 1.0
"""How often a call that waits looks whether the process was closed, and the process whether its owner is there."""
ENDING_S = 5.0
"""How long a killed process may take to end; one that is frozen does not."""


class PlannerLost(RuntimeError):
    """`PlannerLost` says that the planner's process ended, or gave no answer in time."""


class PlannerProcess:
    """`PlannerProcess` plans as a `Planner` does, elsewhere. Calls wait for each other; the first starts the process.

    Args:
        planner: asked anew for each call, because its cost model may have been refitted.
        niceness: how far the process steps back where cores are scarce, 0 to 19.
        limit_s: seconds that an answer may take.
    """

    def __init__(self, planner: Callable[[], Planner], niceness: int = 0, limit_s: float = 60.0) -> None:
        self._planner, self._niceness, self._limit_s = planner, niceness, limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: IO[bytes] | None = None
        self._number = 0
        self._turn = threading.Lock()
        self._closed = False

    def plan(self, lengths: Lengths) -> Plan:
        """Plan a batch as `Planner.plan` does.

        Raises:
            HeteroError: what the planner raised.
            PlannerLost: its process has ended, or did not answer in time.
        """
        return Plan.from_dict(self._ask({"verb": "plan", "lengths": list(lengths)})["plan"])

    def improve(self, plan: Plan, lengths: Lengths) -> Plan:
        """Improve a plan as `Planner.improve` does.

        Raises:
            HeteroError, PlannerLost: as `plan`.
        """
        question = {"verb": "improve", "lengths": list(lengths), "plan": plan.to_dict()}
        return Plan.from_dict(self._ask(question)["plan"])

    def static_seconds(self, lengths: Lengths) -> dict[int, float]:
        """Tell the seconds of runs with one degree as `Planner.static_seconds` does.

        Raises:
            HeteroError, PlannerLost: as `plan`.
        """
        answer = self._ask({"verb": "static_seconds", "lengths": list(lengths)})
        return {int(degree): float(seconds) for degree, seconds in answer["static_s"].items()}

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
                self._end()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Put a question to the process; return its answer, or raise its error as the same kind of error."""
        asked = {**question, "planner": _settings(self._planner())}
        with self._turn:  # one question at a time, so that the next line read is its answer
            process = self._running()
            self._number += 1
            line = json.dumps({**asked, "number": self._number}, default=operator.index) + "\n"
            answer = self._answer(process, line.encode())
        if "error" not in answer:
            return answer
        kind = getattr(errors, answer["error"], None)
        if isinstance(kind, type) and issubclass(kind, HeteroError):
            raise kind(answer["text"])
        raise RuntimeError(f"{answer['error']} in the planner's process: {answer['text']}")

    def _answer(self, process: subprocess.Popen[bytes], line: bytes) -> dict[str, Any]:
        """Return what the process says to a line; whatever else happens, the process is not used again."""
        try:
            answer = json.loads(self._exchanged(process, line))
            if answer["number"] == self._number:
                return answer
            reason = f"it answered question {answer['number']} instead of {self._number}"
        except TimeoutError:
            reason = f"it gave no answer within {self._limit_s:g} s (HeteroConfig.planning_timeout_s)"
        except (OSError, EOFError):
            raise PlannerLost(f"The planner's process ended with code {self._end()}.") from None
        except (ValueError, KeyError, TypeError):
            reason = "its answer cannot be read"
        self._end()
        raise PlannerLost(f"The planner's process was ended: {reason}. The next plan has a new one.")

    def _exchanged(self, process: subprocess.Popen[bytes], line: bytes) -> bytes:
        """Send a line and wait for one. A stopped process neither reads nor writes, so that neither may block."""
        assert process.stdin is not None
        assert self._answers is not None
        unsent, answer, until = memoryview(line), bytearray(), time.monotonic() + self._limit_s
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdin, selectors.EVENT_WRITE)
            ready.register(self._answers, selectors.EVENT_READ)
            while not answer.endswith(b"\n"):
                if self._closed:
                    raise EOFError
                if (left_s := until - time.monotonic()) <= 0:
                    raise TimeoutError
                for key, _ in ready.select(min(left_s, LOOK_S)):
                    if key.fileobj is process.stdin:
                        unsent = unsent[os.write(key.fd, unsent) :]
                        if not unsent:
                            ready.unregister(process.stdin)
                    elif piece := os.read(key.fd, 1 << 16):
                        answer += piece
                    else:
                        raise EOFError
        return bytes(answer)

    def _running(self) -> subprocess.Popen[bytes]:
        """Return the process, a new one where there is none or it has ended."""
        if self._closed:
            raise PlannerLost("The planner's process was closed.")
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            # where its owner found hf_hetero in the current folder, it is found there last
            paths = [path for path in sys.path if path] + [str(Path(errors.__file__).parents[1])]
            outgoing, incoming = os.pipe()
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", START, str(self._niceness), str(incoming)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(incoming,),
                    bufsize=0,
                    env={
                        **os.environ,
                        "PYTHONPATH": os.pathsep.join(paths),
                        # planning shall not compete with the data loader and the trainer for cores
                        "OMP_NUM_THREADS": "1",
                        "OPENBLAS_NUM_THREADS": "1",
                    },
                )
            except OSError:
                os.close(outgoing)
                raise
            finally:
                os.close(incoming)  # else its copy here would keep the pipe open after the process has ended
            self._answers = os.fdopen(outgoing, "rb", buffering=0)
            assert self._process.stdin is not None
            os.set_blocking(self._process.stdin.fileno(), False)
        return self._process

    def _end(self) -> int | None:
        """Kill the process, close its pipes; returns its exit code, or None if it does not end."""
        process, answers = self._process, self._answers
        self._process = self._answers = None
        if process is None:
            return None
        process.kill()
        for pipe in (process.stdin, answers):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        with suppress(subprocess.TimeoutExpired):
            return process.wait(ENDING_S)
        return None


def _settings(planner: Planner) -> dict[str, Any]:
    """Return all fields of a planner, ready for JSON."""
    settings = {item.name: getattr(planner, item.name) for item in fields(planner)}
    return {**settings, "cost_model": planner.cost_model.to_dict(), "methods": list(planner.methods)}


def answered(question: dict[str, Any]) -> dict[str, Any]:
    """Answer one line: a plan, or the name and text of an error."""
    try:
        settings = dict(question["planner"])
        planner = Planner(CostModel.from_dict(settings.pop("cost_model")), **settings)
        if question["verb"] == "static_seconds":
            return {"static_s": planner.static_seconds(question["lengths"])}
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
        question = json.loads(line)
        answers.write(json.dumps({"number": question["number"], **answered(question)}) + "\n")
        answers.flush()


def _end_with_owner(owner: int) -> None:
    """End this process once its owner has gone: while a plan is improved, nobody looks whether input has ended."""
    while os.getppid() == owner:
        time.sleep(LOOK_S)
    os._exit(1)  # not `sys.exit`, which would end this thread only


def main() -> None:
    """Run the process itself; its arguments are its niceness, and the file descriptor for its answers."""
    # Ctrl+C reaches every process of a terminal; the owner decides how a run ends, and may still need a plan
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_owner, args=(os.getppid(),), daemon=True).start()
    os.nice(int(sys.argv[1]))
    serve(sys.stdin, os.fdopen(int(sys.argv[2]), "w", encoding="utf-8"))
