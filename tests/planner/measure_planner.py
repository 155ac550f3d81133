"""How good and how fast plans are, on real lengths: `python tests/planner/measure_planner.py --shared ../shared`."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from hf_hetero.cost_model import CostModel
from hf_hetero.planner import Planner
from hf_hetero.planner.bound import area_bound
from hf_hetero.planner.problem import make_problem

NAMES = ("wikipedia", "prolong", "github", "wlbllm")
SETTINGS = {  # cost model: ranks, samples, longest sample, batches
    "gpt-7b_64xa100_192k": (64, 512, 196_608, 20),
    "gpt-7b_8xa100_nvlink": (8, 128, 65_536, 20),
    "gpt-7b_8xpcie": (8, 128, 65_536, 20),
    "gpt-7b_1024xa100": (1024, 8192, 196_608, 3),
    "gpt-7b_12288xa100": (12_288, 65_536, 196_608, 1),
}


def main() -> None:
    """Print one line for each cost model and source of lengths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/costs and data/lengths")
    parser.add_argument("--costs", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--batches", type=int, help="batches of each kind (default: 20, fewer for large runs)")
    parser.add_argument("--solver", default="fast", choices=["fast", "mip"])
    options = parser.parse_args()
    print("| cost model | lengths | to area bound, median / worst | to certified bound | ms, median / worst |")
    print("|---|---|---|---|---|")
    for name in options.costs:
        num_ranks, num_samples, longest, num_batches = SETTINGS[name]
        planner = Planner(CostModel.load(options.shared / f"data/costs/{name}.json"), num_ranks, solver=options.solver)
        for source in NAMES:
            lengths = np.loadtxt(options.shared / f"data/lengths/{source}.txt", dtype=np.int64)
            lengths = lengths[lengths <= longest]
            batches = [
                np.random.default_rng(seed).choice(lengths, num_samples).tolist()
                for seed in range(options.batches or num_batches)
            ]
            print(f"| {name} | {source} | {measured(planner, batches)} |", flush=True)


def measured(planner: Planner, batches: list[list[int]]) -> str:
    """Ratios to two bounds and milliseconds, as cells of a table."""
    areas: list[float] = []
    bounds: list[float] = []
    times_ms: list[float] = []
    for batch in batches:
        started = time.perf_counter()
        plan = planner.plan(batch)
        times_ms.append(1e3 * (time.perf_counter() - started))
        problem = make_problem(planner.cost_model, planner.num_ranks, None, batch)
        areas.append(plan.seconds / area_bound(problem))
        bounds.append(plan.seconds / plan.lower_bound_s)
    return (
        f"{statistics.median(areas):.3f} / {max(areas):.3f} | {statistics.median(bounds):.3f} / {max(bounds):.3f} | "
        f"{statistics.median(times_ms):.0f} / {max(times_ms):.0f}"
    )


if __name__ == "__main__":
    main()
