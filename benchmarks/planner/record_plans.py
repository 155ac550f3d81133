"""Digests of a thousand plans, to see whether a change of the planner's code changed a plan.

`python benchmarks/planner/record_plans.py FILE` plans and writes them; `--compare FILE` plans and names what differs.
All shipped cost models, four mixes, 8 to 1,024 ranks; also with one degree, with heads exchanged only, with heads that
do not divide, and with memory that is left to the plan.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hf_hetero.costs import ActivationPolicy, CostModel, shipped_names
from hf_hetero.errors import HeteroError
from hf_hetero.planner import Planner
from hf_hetero.what_if.mixes import MIXES, draw_lengths

MIX_NAMES = ("wiki-192k", "github", "prolong", "long-sft")
NUM_RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
SAMPLES_PER_RANK = 4
MOST_SAMPLES = 512
CONTEXT_TOKENS = 65536
FEW_RANKS = 64
"""Up to so many ranks, every way to plan is recorded."""


def recorded(cost: CostModel, mix: str, num_ranks: int) -> Iterator[tuple[str, str]]:
    """The name of each way to plan, and the digest and seconds of its plan, or the error."""
    num_samples = min(MOST_SAMPLES, SAMPLES_PER_RANK * num_ranks)
    lengths, _ = draw_lengths(MIXES[mix], num_samples, seed=num_ranks, max_tokens=CONTEXT_TOKENS)
    batch = lengths.tolist()
    kept, attention, linear = cost.activation_bytes_per_token, cost.attention_s_per_token2, cost.linear_s_per_token
    policies = {
        "recompute": ActivationPolicy(kept / 4, attention * 4 / 3, linear * 4 / 3, exchanges=1.5),
        "offload": ActivationPolicy(kept / 8, attention, linear * 1.1, host_bytes_per_token=kept),
    }
    by_policies = Planner(replace(cost, activation_policies=policies, host_memory_bytes_per_rank=256e9), num_ranks)
    ways = {"plan": Planner(cost, num_ranks).plan, "static": Planner(cost, num_ranks).static}
    if num_ranks <= FEW_RANKS:
        ways["heads"] = Planner(cost, num_ranks, methods=("ulysses",)).plan
        ways["policies"], ways["policies static"] = by_policies.plan, by_policies.static
        if cost.kv_bytes_per_token is not None:
            ways["uneven"] = Planner(replace(cost, num_heads=24, num_kv_heads=6), num_ranks).plan
    for name, way in ways.items():
        try:
            plan = way(batch)
            yield name, f"{plan.digest():016x} {plan.seconds!r} {plan.lower_bound_s!r} {plan.solver}"
        except HeteroError as error:
            yield name, f"{type(error).__name__}: {error}"


def record() -> dict[str, str]:
    """All plans, by cost model, mix, ranks and way."""
    plans: dict[str, str] = {}
    for cost_name in shipped_names():
        cost = CostModel.load(cost_name)
        for mix in MIX_NAMES:
            for num_ranks in NUM_RANKS:
                for way, plan in recorded(cost, mix, num_ranks):
                    plans[f"{cost_name} {mix} {num_ranks} {way}"] = plan
    return plans


def main() -> None:
    """Write the digests, or compare them with a file's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--compare", action="store_true")
    arguments = parser.parse_args()
    started = time.perf_counter()
    plans = record()
    errors = sum("Error" in plan or "Infeasible" in plan for plan in plans.values())
    print(f"{len(plans)} plans ({errors} of them refused) in {time.perf_counter() - started:.0f} s")
    if not arguments.compare:
        arguments.file.write_text(json.dumps(plans, indent=1) + "\n")
        return
    before = json.loads(arguments.file.read_text())
    changed = [name for name in {**before, **plans} if before.get(name) != plans.get(name)]
    for name in changed[:20]:
        print(f"{name}\n  before {before.get(name)}\n  after  {plans.get(name)}")
    raise SystemExit(f"{len(changed)} plans changed" if changed else 0)


if __name__ == "__main__":
    main()
