"""What the tests of uneven machines compare with: a judge that reads files only, and the best of all plans."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from planner.reference import batches, subsets

from hf_hetero.costs import CostModel


def judged_seconds(plan: dict[str, Any], lengths: Sequence[int], cost: dict[str, Any]) -> float:
    """Seconds of a plan whose groups exchange heads, from the JSON of plan and cost model alone, link by link."""
    rank_speeds = {int(rank): speed for rank, speed in cost.get("rank_speeds", {}).items()}
    link_speeds = {int(rank): speed for rank, speed in cost.get("link_speeds", {}).items()}
    total = 0.0
    for micro_batch in plan["micro_batches"]:
        longest = 0.0
        for group in micro_batch["groups"]:
            ranks, held = group["ranks"], [lengths[sample] for sample in group["samples"]]
            slowest = max(1 / rank_speeds.get(rank, 1) for rank in ranks)
            computed = cost["attention_s_per_token2"] * sum(n * n for n in held)
            computed += cost["linear_s_per_token"] * sum(held)
            seconds = cost["micro_batch_s"] + computed / len(ranks) * slowest
            if len(ranks) > 1:
                dearest = max(1 / link_speeds.get(rank, 1) for rank in ranks[1:])
                bandwidth = cost["all_to_all_bytes_per_s"][str(len(ranks))]
                seconds += cost["all_to_all_bytes_per_token"] * sum(held) / len(ranks) / bandwidth * dearest
                seconds += cost.get("all_to_all_latency_s", {}).get(str(len(ranks)), 0.0)
            longest = max(longest, seconds)
        total += longest
    return total


def best_of_all_s(lengths: Sequence[int], num_ranks: int, cost: CostModel) -> float:
    """The fastest step, by looking at all of them, and at each block of ranks; for a handful of samples and ranks."""
    data = cost.to_dict()
    degrees = [d for d in cost.degrees(num_ranks) if d & (d - 1) == 0 or d == num_ranks]
    everything = (1 << len(lengths)) - 1

    @functools.cache
    def group_s(subset: int, first: int, degree: int) -> float:
        held = [sample for sample in range(len(lengths)) if subset >> sample & 1]
        if sum(lengths[sample] for sample in held) > cost.capacity_tokens * degree:
            return math.inf
        alone = {"ranks": list(range(first, first + degree)), "samples": held}
        return judged_seconds({"micro_batches": [{"groups": [alone]}]}, lengths, data)

    @functools.cache
    def from_rank_s(subset: int, first: int) -> float:
        if first == num_ranks:
            return math.inf if subset else 0.0
        fitting = [d for d in degrees if first % d == 0 and first + d <= num_ranks]
        return min(
            max(group_s(part, first, d), from_rank_s(subset ^ part, first + d))
            for d in fitting
            for part in subsets(subset)
        )

    @functools.cache
    def step_s(subset: int) -> float:
        if not subset:
            return 0.0
        longest = subset & -subset
        return min(from_rank_s(part, 0) + step_s(subset ^ part) for part in subsets(subset) if part & longest)

    return step_s(everything)


SPEEDS = st.sampled_from([0.1, 0.5, 0.7, 0.95, 1.0])


@st.composite
def uneven_batches(draw: st.DrawFn, max_ranks: int = 16, max_samples: int = 30) -> tuple[list[int], int, CostModel]:
    """Batches as `planner.reference` draws them, on machines some of whose ranks and links are slower."""
    lengths, num_ranks, cost = draw(batches(max_ranks, max_samples))
    ranks = st.integers(0, num_ranks)  # a rank that there is not, too
    rank_speeds = draw(st.dictionaries(ranks, SPEEDS, min_size=1, max_size=num_ranks))
    link_speeds = draw(st.dictionaries(ranks, SPEEDS, max_size=num_ranks))
    return lengths, num_ranks, replace(cost, rank_speeds=rank_speeds, link_speeds=link_speeds)
