"""What planning takes from the process that trains: `python benchmarks/planner/measure_plan_ahead.py`.

A loop of small tensor operations stands for training: it needs the interpreter all the time, as a CPU that launches
kernels does. Beside it one plan is made for each step's worth of the loop, in a thread of the same process or in a
process of its own, with and without improvements. Rounds are interleaved; the table shows medians.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from hf_hetero.costs import CostModel
from hf_hetero.data.plan_sources import planned_elsewhere
from hf_hetero.planner import Planner

DEGREES = {2: 120e9, 4: 104e9, 8: 96e9, 16: 10e9, 32: 6e9, 64: 5e9}


def machine() -> CostModel:
    """A machine of 64 ranks with fast links in nodes of 8; the numbers only have to make the planner work."""
    return CostModel(5e-9, 2e-4, 0.6, 2e6, DEGREES, 4.7e6, 2e9, 30e9)


def steps_done(seconds: float) -> int:
    """Training's stand-in: how often it gets round in so many seconds."""
    x = torch.randn(64, 64)
    deadline = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < deadline:
        for _ in range(100):
            x = torch.tanh(x)
        rounds += 1
    return rounds


def beside(work: Callable[[], object] | None, every_s: float, seconds: float) -> int:
    """The loop's rounds while something else is done again and again, once every so many seconds."""
    done = threading.Event()

    def again() -> None:
        assert work is not None
        while not done.is_set():
            started = time.perf_counter()
            work()
            done.wait(max(0.0, every_s - (time.perf_counter() - started)))

    thread = threading.Thread(target=again) if work is not None else None
    if thread is not None:
        thread.start()
    rounds = steps_done(seconds)
    done.set()
    if thread is not None:
        thread.join()
    return rounds


def main() -> None:
    """Print one line for each way to plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-s", type=float, default=0.5, help="seconds of a step, each of which needs a plan")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lengths = np.minimum(np.random.default_rng(0).lognormal(7.0, 1.4, 512).astype(int) + 1, 150_000).tolist()
    planner = Planner(machine(), 64)
    elsewhere = planned_elsewhere(lambda: planner, improves=True)
    plan = elsewhere.plan(lengths)
    elsewhere.improve(plan, lengths)
    ways: dict[str, Callable[[], object] | None] = {
        "no planning": None,
        "a thread of the same process": lambda: planner.plan(lengths),
        "a process of its own": lambda: elsewhere.plan(lengths),
        "a process that improves all the time": lambda: elsewhere.improve(plan, lengths),
    }
    rounds: dict[str, list[int]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, work in ways.items():
            rounds[way].append(beside(work, options.step_s, options.seconds))
    elsewhere.close()
    base = statistics.median(rounds["no planning"])
    print("| planning in | speed of the loop |\n|---|---|")
    for way, counted in rounds.items():
        print(f"| {way} | {statistics.median(counted) / base:.3f} |")


if __name__ == "__main__":
    main()
