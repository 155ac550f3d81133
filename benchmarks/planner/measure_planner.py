"""How good and how fast plans are, on real lengths: `python benchmarks/planner/measure_planner.py --shared DIR`."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from hf_hetero.costs import CostModel
from hf_hetero.planner import Planner
from hf_hetero.planner.bound import area_bound
from hf_hetero.planner.improve.relaxation import relaxed_bound
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
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--improve-s", type=float, default=0.0, help="also improve each plan and its bound, with this many seconds"
    )
    parser.add_argument(
        "--bound-s", type=float, default=0.0, help="also prove a closer bound of each plan, with this many seconds"
    )
    options = parser.parse_args()
    print(
        "| cost model | lengths | to area bound, median / worst | to certified bound | wall ms | CPU ms "
        "| gain of improving, geometric mean / min / max | CPU s of improving |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in options.costs:
        num_ranks, num_samples, longest, num_batches = SETTINGS[name]
        planner = Planner(
            CostModel.load(options.shared / f"data/costs/{name}.json"),
            num_ranks,
            mip_time_limit_s=options.improve_s or 1.0,
        )
        for source in NAMES:
            lengths = np.loadtxt(options.shared / f"data/lengths/{source}.txt", dtype=np.int64)
            lengths = lengths[lengths <= longest]
            batches = [
                np.random.default_rng(seed).choice(lengths, num_samples).tolist()
                for seed in range(options.first_seed, options.first_seed + (options.batches or num_batches))
            ]
            print(
                f"| {name} | {source} | {measured(planner, batches, options.improve_s > 0, options.bound_s)} |",
                flush=True,
            )


def measured(planner: Planner, batches: list[list[int]], improve: bool, bound_s: float) -> str:
    """Ratios to two bounds, milliseconds of the fast plan, and what improving it gained, as cells of a table."""
    areas: list[float] = []
    bounds: list[float] = []
    wall_ms: list[float] = []
    cpu_ms: list[float] = []
    gains: list[float] = []
    improving_s: list[float] = []
    for batch in batches:
        wall, cpu = time.perf_counter(), time.process_time()
        plan = fast = planner.plan(batch)
        wall_ms.append(1e3 * (time.perf_counter() - wall))
        cpu_ms.append(1e3 * (time.process_time() - cpu))
        if improve:
            cpu = time.process_time()
            plan = planner.improve(fast, batch)
            improving_s.append(time.process_time() - cpu)
        gains.append(fast.seconds / plan.seconds)
        problem = make_problem(planner.cost_model, planner.num_ranks, None, batch)
        bound = max(plan.lower_bound_s, relaxed_bound(problem, plan.seconds, bound_s) if bound_s else 0.0)
        areas.append(plan.seconds / area_bound(problem))
        bounds.append(plan.seconds / bound)
    return " | ".join(
        [
            *(f"{statistics.median(x):.3f} / {max(x):.3f}" for x in (areas, bounds)),
            *(f"{statistics.median(x):.0f} / {max(x):.0f}" for x in (wall_ms, cpu_ms)),
            f"{statistics.geometric_mean(gains):.4f} / {min(gains):.4f} / {max(gains):.4f}" if improve else "-",
            f"{statistics.median(improving_s):.1f} / {max(improving_s):.1f}" if improve else "-",
        ]
    )


if __name__ == "__main__":
    main()
