"""Whole jobs of several ranks over NCCL, all on one GPU: `python benchmarks/gpu/measure_jobs.py --device cpu`.

Each rank is a process that takes itself for a machine of one GPU (`NCCL_HOSTID`), so that NCCL lets them share it and
carries everything by sockets of this machine. That shows what virtual ranks cannot: process groups, collectives and
messages on streams of their own, FSDP2, checkpoints and faults, as on a cluster. It shows no speed: ranks take turns.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from job_of_ranks import FAULTS, FSDP, PATIENCE_S, REPEATED, SAVING
from stage import Stage, begin

from hf_hetero.plan import METHODS

RANK = Path(__file__).with_name("job_of_ranks.py")
DEGREES = (2, 4)
JOB_S, FAULT_S = 120, 60
MINIATURE_S = 240
"""Of a job on a CPU, where each rank takes the cores that others want, from its first import on."""
EQUAL = {"fp32": 2e-5, "bf16": 2e-2}
"""How far weights may have moved apart, as a share of how far they have moved."""


class Job:
    """Ranks that have been started.

    Args:
        num_ranks: of the job.
        cases: names of what each of them does, one after the other.
        device: that all of them share.
    """

    def __init__(self, num_ranks: int, cases: list[str], device: torch.device) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._start_s = time.monotonic()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
        if REPEATED in cases:
            common["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] = str(PATIENCE_S)
        common |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NCCL_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        self._logs = [Path(self._folder.name) / f"{rank}.log" for rank in range(num_ranks)]
        self._ranks: list[subprocess.Popen[bytes]] = []
        for rank, log in enumerate(self._logs):
            own = {"RANK": str(rank), "NCCL_HOSTID": f"machine-{rank}"}
            command = [sys.executable, str(RANK), device.type, self._folder.name, *cases]
            with log.open("wb") as out:
                self._ranks.append(subprocess.Popen(command, env=common | own, stdout=out, stderr=out))

    def wait(self, limit_s: float) -> tuple[list[dict[str, Any]], list[int | None], float]:
        """What each rank has found, its exit code (None: it had to be ended), and the seconds of all of it."""
        until = time.monotonic() + limit_s
        for process in self._ranks:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
        codes = [process.poll() for process in self._ranks]
        for process in self._ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
        found: list[dict[str, Any]] = []
        for rank in range(len(self._ranks)):
            path = Path(self._folder.name) / f"{rank}.json"
            found.append(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
        return found, codes, time.monotonic() - self._start_s

    def last_words(self) -> str:
        """What each rank has said last."""
        said: list[str] = []
        for rank, log in enumerate(self._logs):
            text = log.read_text(encoding="utf-8", errors="replace")
            told = [line for line in text.splitlines() if not line.startswith(("frame #", "Exception raised from"))]
            print("\n".join([f"----- rank {rank}", *(line[:300] for line in told[-120:])]), flush=True)
            lines = [line for line in told if "Error" in line or "error" in line]
            said.append(f"rank {rank}: {' / '.join(lines[-3:])[-400:]}")
        return "; ".join(said)

    def weights(self, case: str) -> torch.Tensor | None:
        """How far one case's weights have moved on rank 0, in one row."""
        path = Path(self._folder.name) / f"{case}.pt"
        return torch.load(path) if path.exists() else None

    def close(self) -> None:
        """Remove its files."""
        self._folder.cleanup()


def learning(stage: Stage) -> torch.Tensor | None:
    """Weights after some steps of groups that share samples, against those of one rank, which are returned."""
    single = Job(1, ["fp32-ulysses", "bf16-ulysses"], stage.device)
    found, codes, _ = single.wait(stage.pick(JOB_S, MINIATURE_S))
    exact, rounded = single.weights("fp32-ulysses"), single.weights("bf16-ulysses")
    if exact is None or rounded is None:
        stage.note(f"One rank failed with exit code {codes[0]}: {single.last_words()}")
        return None
    stage.row("Learning over NCCL", ranks=1, case="bf16-ulysses", loss=found[0]["bf16-ulysses"]["loss"],
              **{"weights differ by": f"{apart(rounded, exact):.1e}"})  # fmt: skip
    sharded = FSDP if stage.device.type == "cuda" else ()  # accelerate shards nothing on a CPU
    for degree in stage.pick(DEGREES, DEGREES[:1]):
        methods = [method for method in METHODS if degree > 2 or method != "ulysses_ring"]
        methods = stage.pick(methods, ["gather"])
        dtypes = stage.pick(EQUAL if degree == 2 else ("bf16",), ("fp32",))
        cases = [f"{dtype}-{method}" for dtype in dtypes for method in methods] + ["fp32-mixed", SAVING, *sharded]
        compare(stage, Job(degree, cases, stage.device), degree, cases, exact)
    single.close()
    return exact


def compare(stage: Stage, job: Job, degree: int, cases: list[str], exact: torch.Tensor) -> None:
    """One job's rows."""
    found, codes, took_s = job.wait(max(1.0, min(stage.pick(JOB_S, MINIATURE_S), stage.left_s - 5)))
    for case in cases:
        moved, said = job.weights(case), (found[0] or {}).get(case, {})
        if moved is None:
            stage.row("Learning over NCCL", ranks=degree, case=case, equal="NO RESULT", error=said.get("error"))
            continue
        far = apart(moved, exact)
        allowed = EQUAL["bf16" if "bf16" in case else "fp32"]
        stage.row(
            "Learning over NCCL",
            ranks=degree,
            case=case,
            loss=said["loss"],
            **{"weights differ by": f"{far:.1e}"},
            equal="yes" if far <= allowed else "NO",
            wrapper=said["wrapper"],
            seconds=said["seconds"],
        )
    stage.fact(f"job of {degree} ranks (s)", round(took_s, 1))
    if any(codes):
        stage.note(f"A job of {degree} ranks ended with {codes}: {job.last_words()}")
    job.close()


def apart(moved: torch.Tensor, exact: torch.Tensor) -> float:
    """Of all weights together."""
    return float((moved - exact).norm() / exact.norm())


def faults(stage: Stage, exact: torch.Tensor | None) -> None:
    """How ranks end, and when, where one of them fails; and what a step that is repeated comes to."""
    for name, expected in FAULTS.items():
        if stage.is_miniature and "killed" not in name:
            continue  # minutes of waiting, which tests of faults have, too
        if stage.left_s < 30:
            stage.note(f"No time left for the fault {name!r}.")
            continue
        job = Job(2, [name], stage.device)
        found, codes, took_s = job.wait(min(stage.pick(FAULT_S, MINIATURE_S), stage.left_s - 5))
        ends = [one.get(name, {}).get("ended", f"exit code {code}") for one, code in zip(found, codes, strict=True)]
        stage.row("Faults over NCCL", fault=name, expected=expected, seconds=round(took_s, 1),
                  **{f"rank {rank}": end for rank, end in enumerate(ends)})  # fmt: skip
        moved = job.weights(name)
        if moved is not None and exact is not None:
            far = apart(moved, exact)
            equal = "yes" if far <= EQUAL["bf16"] else "NO"
            case = "bf16-ring, memory ended in a step"
            stage.row("Learning over NCCL", ranks=2, case=case, **{"weights differ by": f"{far:.1e}"}, equal=equal)
        print(job.last_words())
        job.close()


def main() -> None:
    """Measure, and write as it comes."""
    stage = begin(__doc__)
    exact = learning(stage)
    with stage.alone("Faults"):
        faults(stage, exact)
    stage.done()


if __name__ == "__main__":
    main()
