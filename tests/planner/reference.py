"""What the planner's tests compare with: an exhaustive search, a judge of plans, and ways to draw batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from hypothesis import strategies as st

from hf_hetero.costs import CostModel
from hf_hetero.plan import Plan

SHARED = Path(__file__).resolve().parents[3] / "shared"


def problems(plan: Plan, lengths: Sequence[int], num_ranks: int, cost: CostModel) -> list[str]:
    """Everything that is wrong with a plan and that `Plan` itself does not refuse."""
    wrong = [] if plan.num_ranks == num_ranks else [f"{plan.num_ranks} ranks"]
    if plan.num_samples != len(lengths):
        wrong.append(f"{plan.num_samples} samples, not {len(lengths)}")
    for group in plan.groups:
        if group.degree not in cost.degrees(num_ranks):
            wrong.append(f"degree {group.degree} is not offered")
        tokens = sum(int(lengths[sample]) for sample in group.samples)
        if tokens > cost.of_group(group).capacity_tokens * group.degree:
            wrong.append(f"{tokens} tokens at degree {group.degree}")
    return wrong


def tilings(num_ranks: int, degrees: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All ways to have groups of these degrees, largest first; ranks left over stay empty."""
    yield ()
    for degree in degrees:
        if degree <= num_ranks:
            for rest in tilings(num_ranks - degree, [d for d in degrees if d <= degree]):
                yield (degree, *rest)


def optimal_seconds(lengths: Sequence[int], num_ranks: int, cost: CostModel) -> float:
    """The fastest step, by looking at all of them; for a handful of samples and ranks."""
    degrees = [d for d in cost.degrees(num_ranks) if d & (d - 1) == 0 or d == num_ranks]
    everything = (1 << len(lengths)) - 1

    @functools.cache
    def group_s(subset: int, degree: int) -> float:
        entries = [length for sample, length in enumerate(lengths) if subset >> sample & 1]
        held = [n for entry in entries for n in (entry if isinstance(entry, tuple) else (entry,))]
        ways = [under for under in cost.by_activations.values() if sum(held) <= under.capacity_tokens * degree]
        return min((under.seconds(held, degree) for under in ways), default=math.inf)

    @functools.cache
    def tiled_s(subset: int, tiling: tuple[int, ...]) -> float:
        if not subset:
            return cost.fixed_s(1)
        if not tiling:
            return math.inf
        return min(max(group_s(part, tiling[0]), tiled_s(subset ^ part, tiling[1:])) for part in subsets(subset))

    @functools.cache
    def step_s(subset: int) -> float:
        if not subset:
            return 0.0
        longest = subset & -subset
        return min(
            min(tiled_s(part, tiling) for tiling in tilings(num_ranks, degrees)) + step_s(subset ^ part)
            for part in subsets(subset)
            if part & longest
        )

    return step_s(everything)


def subsets(subset: int) -> Iterator[int]:
    """All subsets of a bit set, the empty one included."""
    part = subset
    while part:
        yield part
        part = (part - 1) & subset
    yield 0


@st.composite
def costs(draw: st.DrawFn, max_ranks: int = 24) -> CostModel:
    """Cost models of every kind: with and without exchange, latency, attention or a fixed cost; odd degrees."""
    degrees = draw(st.sets(st.integers(2, max_ranks), max_size=3)) | draw(st.sets(st.sampled_from([2, 4, 8, 16])))
    return CostModel(
        attention_s_per_token2=draw(st.sampled_from([0.0, 1e-3, 0.1])),
        linear_s_per_token=draw(st.sampled_from([0.0, 0.01, 1.0])),
        micro_batch_s=draw(st.sampled_from([0.0, 0.1, 5.0, 100.0])),
        all_to_all_bytes_per_token=draw(st.sampled_from([0.0, 1.0])),
        all_to_all_bytes_per_s={d: draw(st.sampled_from([0.5, 10.0, 1000.0])) for d in sorted(degrees)},
        all_to_all_latency_s={d: draw(st.sampled_from([0.0, 0.5])) for d in sorted(degrees)},
        activation_bytes_per_token=1.0,
        model_state_bytes_per_rank=0.0,
        memory_bytes_per_rank=float(draw(st.integers(1, 60))),
    )


@st.composite
def batches(draw: st.DrawFn, max_ranks: int = 24, max_samples: int = 40) -> tuple[list[int], int, CostModel]:
    """Lengths that some degree holds, a number of ranks, and a cost model."""
    num_ranks = draw(st.integers(1, max_ranks))
    cost = draw(costs(max_ranks))
    usable = [d for d in cost.degrees(num_ranks) if d & (d - 1) == 0 or d == num_ranks]
    longest = cost.capacity_tokens * max(usable)
    length = st.one_of(st.integers(1, longest), st.integers(1, min(longest, cost.capacity_tokens)), st.just(longest))
    return draw(st.lists(length, min_size=1, max_size=max_samples)), num_ranks, cost


def small_cost(capacity: int = 100, degrees: Sequence[int] = (2, 4, 8), **changed: float) -> CostModel:
    """A machine whose numbers are easy to follow: a token takes 1 s, an exchange adds a tenth, a micro-batch 50 s."""
    numbers = {
        "attention_s_per_token2": 1e-3,
        "linear_s_per_token": 1.0,
        "micro_batch_s": 50.0,
        "all_to_all_bytes_per_token": 1.0,
        "activation_bytes_per_token": 1.0,
        "model_state_bytes_per_rank": 0.0,
        "memory_bytes_per_rank": float(capacity),
    }
    return CostModel(all_to_all_bytes_per_s=dict.fromkeys(degrees, 10.0), **(numbers | changed))
