"""Our plans beside those of FlexSP's solver: `python benchmarks/planner/compare_flexsp.py --shared DIR`.

Needs `pip install pyscipopt`. FlexSP's planning takes minutes a batch on one core, by design: some programs for each of
five numbers of micro-batches, five seconds each. Two times are given for it: of one process after the other, and of the
slowest of its programs, as if it had a core for each of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from planner.flexsp import Settings, solve

from hf_hetero.costs import CostModel
from hf_hetero.planner import Planner

NAMES = ("wikipedia", "prolong", "github", "wlbllm")
LONGEST_TOKENS = 192 * 1024


def main() -> None:
    """Print one line a batch, and what they come to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/costs and data/lengths")
    parser.add_argument("--cost", default="gpt-7b_64xa100_192k")
    parser.add_argument("--lengths", nargs="*", default=list(NAMES))
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=5.0, help="of each of FlexSP's programs")
    parser.add_argument("--min-degree", type=int, default=1, help="2 is what FlexSP's code allows, 1 its paper")
    parser.add_argument("--json", type=Path, help="write all results here as well")
    options = parser.parse_args()
    cost = CostModel.load(options.shared / f"data/costs/{options.cost}.json")
    planner = Planner(cost, options.ranks)
    settings = Settings(limit_s=options.limit_s, min_degree=options.min_degree)
    print("| lengths | seed | FlexSP s | ours s | FlexSP / ours | FlexSP plans in CPU s, all / slowest | ours in ms |")
    print("|---|---|---|---|---|---|---|")
    results: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + options.batches):
        for name in options.lengths:
            lengths = np.loadtxt(options.shared / f"data/lengths/{name}.txt", dtype=np.int64)
            lengths = lengths[lengths <= LONGEST_TOKENS]
            batch: list[int] = np.random.default_rng(seed).choice(lengths, options.batch_size).tolist()
            results.append({"lengths": name, "seed": seed, **compared(batch, cost, planner, settings)})
            print(row(results[-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
    print(summary(results))


def compared(batch: list[int], cost: CostModel, planner: Planner, settings: Settings) -> dict[str, Any]:
    """Both plans of one batch, judged by the cost model with exact lengths. Ours is made before and after FlexSP's."""
    before, before_ms = planned(planner, batch)
    outcome = solve(batch, cost, planner.num_ranks, settings)
    _, after_ms = planned(planner, batch)
    theirs = outcome.plan or min((planner.static(batch, d) for d in fitting(batch, planner)), key=lambda p: p.seconds)
    return {
        "flexsp_s": cost.plan_seconds(theirs, batch),
        "ours_s": cost.plan_seconds(before, batch),
        "flexsp_gave_up": outcome.plan is None,
        "flexsp_planning_s": outcome.cpu_s,
        "flexsp_slowest_s": max(program.cpu_s for program in outcome.programs),
        "flexsp_programs": len(outcome.programs),
        "flexsp_seconds_by_count": outcome.seconds_by_count,
        "ours_planning_s": max(before_ms, after_ms) / 1e3,
    }


def planned(planner: Planner, batch: list[int]) -> tuple[Any, float]:
    """A plan, and the CPU milliseconds that it took."""
    start = time.process_time()
    plan = planner.plan(batch)
    return plan, 1e3 * (time.process_time() - start)


def fitting(batch: list[int], planner: Planner) -> list[int]:
    """Degrees that hold the longest sample: what a user of FlexSP is left with when it finds no plan."""
    return [d for d in planner.degrees if max(batch) <= d * planner.cost_model.capacity_tokens]


def row(result: dict[str, Any]) -> str:
    """One batch."""
    gave_up = " (gave up: best one degree)" if result["flexsp_gave_up"] else ""
    return (
        f"| {result['lengths']} | {result['seed']} | {result['flexsp_s']:.3f}{gave_up} | {result['ours_s']:.3f} "
        f"| {result['flexsp_s'] / result['ours_s']:.3f} | {result['flexsp_planning_s']:.1f} / "
        f"{result['flexsp_slowest_s']:.1f} | {1e3 * result['ours_planning_s']:.0f} |"
    )


def summary(results: list[dict[str, Any]]) -> str:
    """Ratios over all batches; above 1 is in our favour."""

    def over(theirs: str, ours: str) -> tuple[float, float]:
        ratios = [result[theirs] / result[ours] for result in results]
        return statistics.geometric_mean(ratios), min(ratios)

    step, all_programs = over("flexsp_s", "ours_s"), over("flexsp_planning_s", "ours_planning_s")
    slowest = over("flexsp_slowest_s", "ours_planning_s")
    return (
        f"{len(results)} batches. Steps: geometric mean {step[0]:.3f}x, worst {step[1]:.3f}x. "
        f"Planning: {all_programs[0]:.0f}x (worst {all_programs[1]:.0f}x) less CPU time; "
        f"{slowest[0]:.0f}x (worst {slowest[1]:.0f}x) less than the slowest program alone."
    )


if __name__ == "__main__":
    main()
