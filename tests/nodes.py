"""Nodes for tests: `torchrun` itself, several on loopback, each with its ranks; they can be lost, and come back.

A node is a process group of its own, started from one that has imported what training takes; torchrun forks its ranks
(`--run-path --start-method fork`), so that a rank starts in a fraction of a second.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from helpers import forked

ENVIRONMENT = {
    # torch's store for the ranks is made once in the life of an agent, else: who comes back meets what was said before
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "OMP_NUM_THREADS": "1",
}
RENDEZVOUS = {"is_host": 0, "last_call_timeout": 4, "keep_alive_interval": 1, "keep_alive_max_attempt": 5}
"""Seconds, small ones: how long the others are waited for, and when a node counts as lost."""


def _torchrun(line: list[str], log: str, environment: dict[str, str], together: Any) -> None:
    """Be torchrun, with all that it writes in a file; nodes that are started together begin at one moment."""
    os.setsid()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.argv = ["torchrun", *line]
    from torch.distributed.run import main

    if together is not None:
        together.wait(120)
    try:
        main(line)
    except SystemExit:
        raise
    except BaseException as error:
        print(f"torchrun ended with {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


@dataclass
class Node:
    """A node that runs, or has run."""

    process: Any
    log: Path

    def lose(self) -> None:
        """Kill all of it at once: the agent, its ranks, and what these have started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    def said(self) -> str:
        """What its ranks and torchrun wrote."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Nodes:
    """The nodes of a job, and the store at which they meet, which is on none of them."""

    def __init__(
        self, folder: Path, script: Path, arguments: list[str], most: int, least: int = 1, ranks: int = 1
    ) -> None:
        self.folder, self.nodes = folder, dict[int, Node]()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=9))
        conf = ",".join(f"{name}={value}" for name, value in RENDEZVOUS.items())
        self.line = [
            *("--nnodes", f"{least}:{most}", "--nproc-per-node", str(ranks), "--max-restarts", "20"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{self.store.port}", "--rdzv-id", "a-job"),
            *("--rdzv-conf", conf, "--local-addr", "127.0.0.1", "--run-path", "--start-method", "fork"),
            *(str(script), *arguments),
        ]

    def start(self, *numbers: int) -> None:
        """Start nodes, or start them again: none is so late that the others begin without it."""
        context = forked()
        # kept: it goes with what has made it, though those to whom it was given have not taken it up yet
        self.together = context.Barrier(len(numbers)) if len(numbers) > 1 else None
        for number in numbers:
            log = self.folder / f"node-{number}.log"
            args = self.line, str(log), {**ENVIRONMENT, "NODE": str(number)}, self.together
            process = context.Process(target=_torchrun, args=args)
            process.start()
            self.nodes[number] = Node(process, log)

    def wait(self, until: Callable[[], bool], timeout_s: float) -> None:
        """Wait for something; with what all have said if it does not come."""
        end = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def ended(self) -> bool:
        """Whether no node runs any more."""
        return all(node.process.exitcode is not None for node in self.nodes.values())

    def logs(self) -> str:
        """All that nodes wrote."""
        return "\n".join(node.said() for node in self.nodes.values())

    def said(self) -> str:
        """The last of what each wrote."""
        return "\n".join(f"--- node {number}\n{node.said()[-3000:]}" for number, node in sorted(self.nodes.items()))

    def close(self) -> None:
        """End what is left."""
        for node in self.nodes.values():
            node.lose()
