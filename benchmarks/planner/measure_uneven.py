"""What it is worth to know which ranks and links are slow: `python benchmarks/planner/measure_uneven.py --shared DIR`.

Plans of real lengths on machines with a slow node, a slow rank, and the like: how much longer the plan takes that knows
of no speeds, placed as it happens to be; how much longer the best plan with one degree, placed as well as can be; and
how far the plan is above its bound.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from hf_hetero.costs import CostModel
from hf_hetero.planner import Planner

NAMES = ("wikipedia", "prolong", "github", "wlbllm")
SETTINGS = {  # cost model: ranks, samples, longest sample, batches
    "gpt-7b_64xa100_192k": (64, 512, 196_608, 5),
    "gpt-7b_8xa100_nvlink": (8, 128, 65_536, 5),
}
MACHINES: dict[str, Callable[[CostModel, int], CostModel]] = {
    "one node of 8 at 0.7": lambda cost, n: replace(cost, rank_speeds=dict.fromkeys(range(n - 8, n), 0.7)),
    "half of all ranks at 0.7": lambda cost, n: replace(cost, rank_speeds=dict.fromkeys(range(n // 2, n), 0.7)),
    "one rank at 0.7": lambda cost, n: replace(cost, rank_speeds={n // 2 + 1: 0.7}),
    "one rank at 0.9": lambda cost, n: replace(cost, rank_speeds={n // 2 + 1: 0.9}),
    "a quarter of the bandwidth between halves": lambda cost, n: replace(cost, link_speeds={n // 2: 0.25}),
    "half of the bandwidth around one node of 8": lambda cost, n: replace(
        cost, link_speeds={r: 0.5 for r in (n - 8, n) if 0 < r < n}
    ),
}


def main() -> None:
    """Print one line for each cost model, machine and source of lengths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/costs and data/lengths")
    parser.add_argument("--costs", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--machines", nargs="*", default=list(MACHINES), choices=list(MACHINES))
    parser.add_argument("--sources", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--batches", type=int, help="batches of each kind")
    parser.add_argument("--improve-s", type=float, default=0.0, help="also improve each plan, with this many seconds")
    options = parser.parse_args()
    print("| cost model | machine | lengths | unaware, by ours | one degree, by ours | ours, by its bound | CPU ms |")
    print("|---|---|---|---|---|---|---|")
    for name in options.costs:
        num_ranks, num_samples, longest, num_batches = SETTINGS[name]
        cost = CostModel.load(options.shared / f"data/costs/{name}.json")
        for machine in options.machines:
            slow = MACHINES[machine](cost, num_ranks)
            if not slow.is_uneven or (len(slow.rank_speeds) == num_ranks):
                continue  # no such machine: a node is all there is
            planner = Planner(slow, num_ranks, mip_time_limit_s=options.improve_s or 1.0)
            for source in options.sources:
                lengths = np.loadtxt(options.shared / f"data/lengths/{source}.txt", dtype=np.int64)
                lengths = lengths[lengths <= longest]
                batches = [
                    np.random.default_rng(seed).choice(lengths, num_samples).tolist()
                    for seed in range(options.batches or num_batches)
                ]
                cells = measured(planner, batches, options.improve_s > 0)
                print(f"| {name} | {machine} | {source} | {cells} |", flush=True)


def measured(planner: Planner, batches: list[list[int]], improve: bool) -> str:
    """Ratios of seconds, median and worst, and the CPU milliseconds of a plan, as cells of a table."""
    cost = planner.cost_model
    unaware, static, gaps, cpu_ms = list[float](), list[float](), list[float](), list[float]()
    for batch in batches:
        started = time.process_time()
        plan = planner.plan(batch)
        cpu_ms.append(1e3 * (time.process_time() - started))
        if improve:
            plan = planner.improve(plan, batch)
        ignoring = replace(planner, cost_model=cost.evened()).plan(batch)
        unaware.append(cost.plan_seconds(ignoring, batch) / plan.seconds)
        static.append(planner.static(batch).seconds / plan.seconds)
        gaps.append(plan.seconds / plan.lower_bound_s)
    pairs = (unaware, min), (static, min), (gaps, max)
    return " | ".join(
        [*(f"{statistics.median(x):.3f} / {worst(x):.3f}" for x, worst in pairs), f"{statistics.median(cpu_ms):.0f}"]
    )


if __name__ == "__main__":
    main()
