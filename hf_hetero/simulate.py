"""What if: predicted seconds of the same batches under different ways to share them. No GPU, no model, no torch.

adaptive       this package: degrees chosen for every group of every step
static         one degree for the whole run, the best of them (DeepSpeed-Ulysses with packing)
batch-static   one degree for each batch, the best of them (FlexSP's "BatchAda", arXiv:2412.01523, section 6.1)
dynamic-cp     Megatron's: the smallest power of two that holds each sample, greedily balanced
padded         data parallel without sharing: each rank pads its samples to the longest of them
bound          no way is faster
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_hetero.cost_model import CostModel
from hf_hetero.errors import BadSample
from hf_hetero.plan import Group, MicroBatch, Plan, idle_share
from hf_hetero.planner import Planner

SIMULATION_FORMAT = "hf-hetero-simulation/1"


@dataclass
class WayTotals:
    """One way's totals over the steps.

    Args:
        seconds: of each step.
        num_micro_batches: of all steps.
        idle_s, rank_s: rank-seconds spent waiting, and in all.
        note: for people, such as the degree chosen.
    """

    seconds: list[float] = field(default_factory=list[float])
    num_micro_batches: int = 0
    idle_s: float = 0.0
    rank_s: float = 0.0
    note: str = ""

    def add(self, plan: Plan, lengths: Sequence[int], cost: CostModel) -> None:
        """Count one step."""
        busy = busy_seconds(plan, lengths, cost)
        step = sum(max(ranks) for ranks in busy)
        self.seconds.append(step)
        self.num_micro_batches += len(busy)
        self.rank_s += step * plan.num_ranks
        self.idle_s += step * plan.num_ranks * idle_share(busy)


@dataclass(frozen=True)
class Simulation:
    """Totals of each way over the same steps.

    Args:
        num_ranks, num_steps, num_samples, num_tokens: what was simulated.
        ways: by name; a way that cannot hold a sample is absent.
        bound_s: certified lower bound of each step, in seconds.
        planning_s: wall time of each adaptive plan.
    """

    num_ranks: int
    num_steps: int
    num_samples: int
    num_tokens: int
    ways: dict[str, WayTotals]
    bound_s: list[float]
    planning_s: list[float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        adaptive = sum(self.ways["adaptive"].seconds)
        return {
            "format": SIMULATION_FORMAT,
            "num_ranks": self.num_ranks,
            "num_steps": self.num_steps,
            "num_samples": self.num_samples,
            "num_tokens": self.num_tokens,
            "lower_bound_s": sum(self.bound_s),
            "planning_s": self.planning_s,
            "ways": {
                name: {
                    "seconds": sum(way.seconds),
                    "step_s": way.seconds,
                    "speedup_of_adaptive": sum(way.seconds) / adaptive,
                    "ratio_to_bound": sum(way.seconds) / sum(self.bound_s),
                    "micro_batches": way.num_micro_batches,
                    "idle_share": way.idle_s / way.rank_s,
                    "note": way.note,
                }
                for name, way in self.ways.items()
            },
        }


def simulate(
    batches: Sequence[Sequence[int]],
    cost: CostModel,
    num_ranks: int,
    solver: Any = "auto",
    progress: Callable[[Sequence[Sequence[int]]], Any] = iter,
) -> Simulation:
    """Plan every batch in every way.

    Args:
        batches: lengths of the samples of each step.
        cost: machine and model.
        num_ranks: ranks of the run.
        solver: of the adaptive plans.
        progress: wraps the batches, for a progress bar.

    Raises:
        InfeasibleBatch: a sample that no degree can hold.
    """
    if not batches or not all(batches):
        raise BadSample("There is nothing to simulate: give at least one step with one sample.")
    planner = Planner(cost, num_ranks=num_ranks, solver=solver)
    ways = {name: WayTotals() for name in ("adaptive", "static", "batch-static", "dynamic-cp", "padded")}
    by_degree = {degree: WayTotals() for degree in planner.degrees}
    bound_s: list[float] = []
    planning_s: list[float] = []
    for lengths in progress(batches):
        plan = planner.plan(lengths)
        bound_s.append(plan.lower_bound_s)
        planning_s.append(plan.planning_s)
        ways["adaptive"].add(plan, lengths, cost)
        fixed = {degree: planner.static(lengths, degree) for degree in by_degree if _holds(cost, degree, lengths)}
        for degree in list(by_degree):
            if degree in fixed:
                by_degree[degree].add(fixed[degree], lengths, cost)
            else:
                del by_degree[degree]
        ways["batch-static"].add(min(fixed.values(), key=lambda p: p.seconds), lengths, cost)
        ways["dynamic-cp"].add(dynamic_cp(lengths, cost, num_ranks, planner.degrees), lengths, cost)
        if _holds(cost, 1, lengths) and "padded" in ways:
            _add_padded(ways["padded"], lengths, cost, num_ranks)
        else:
            ways.pop("padded", None)
    best = min(by_degree, key=lambda degree: sum(by_degree[degree].seconds))
    ways["static"] = by_degree[best]
    ways["static"].note = f"degree {best}"
    return Simulation(
        num_ranks, len(batches), sum(map(len, batches)), sum(map(sum, batches)), ways, bound_s, planning_s
    )


def busy_seconds(plan: Plan, lengths: Sequence[int], cost: CostModel) -> list[list[float]]:
    """Predicted seconds of each micro-batch (outer) on each rank (inner)."""
    return [
        [seconds for group in m.groups for seconds in [cost.group_seconds(group, lengths)] * group.degree]
        for m in plan.micro_batches
    ]


def dynamic_cp(lengths: Sequence[int], cost: CostModel, num_ranks: int, degrees: Sequence[int]) -> Plan:
    """Megatron-Core's dynamic context parallelism, as its scheduler describes itself (Megatron-LM, PRs 2282 and 5679).

    Each sample gets the smallest power of two of ranks that holds it. Longest first, it goes to the lightest group of
    that degree with room, or to free ranks of the micro-batch; when neither is there, the micro-batch is closed. Ranks
    that stay free are given to the smallest groups, which double. Work is counted as s^2 / degree.
    """
    waiting = sorted(range(len(lengths)), key=lambda sample: (-lengths[sample], sample))
    micro_batches: list[MicroBatch] = []
    while waiting:
        groups: list[tuple[int, list[int]]] = []
        left: list[int] = []
        for sample in waiting:
            degree = next(d for d in degrees if d * cost.capacity_tokens >= lengths[sample])
            open_groups = [
                (sum(lengths[s] ** 2 for s in held) / d, index)
                for index, (d, held) in enumerate(groups)
                if d == degree and sum(lengths[s] for s in held) + lengths[sample] <= d * cost.capacity_tokens
            ]
            if sum(d for d, _ in groups) + degree <= num_ranks:
                groups.append((degree, [sample]))
            elif open_groups:
                groups[min(open_groups)[1]][1].append(sample)
            else:
                left.append(sample)
        micro_batches.append(_filled(groups, num_ranks, degrees))
        waiting = left
    return Plan(num_ranks, tuple(micro_batches))


def _filled(groups: list[tuple[int, list[int]]], num_ranks: int, degrees: Sequence[int]) -> MicroBatch:
    """Give free ranks to the smallest groups that can double, then name the ranks."""
    free = num_ranks - sum(degree for degree, _ in groups)
    while True:
        doubling = [i for i, (degree, _) in enumerate(groups) if degree <= free and 2 * degree in degrees]
        if not doubling:
            break
        smallest = min(doubling, key=lambda i: (groups[i][0], i))
        degree, held = groups[smallest]
        groups[smallest] = (2 * degree, held)
        free -= degree
    named: list[Group] = []
    start = 0
    for degree, held in sorted(groups, key=lambda group: -group[0]):
        named.append(Group(tuple(range(start, start + degree)), tuple(held)))
        start += degree
    named += [Group((rank,), ()) for rank in range(start, num_ranks)]
    return MicroBatch(tuple(named))


def _holds(cost: CostModel, degree: int, lengths: Sequence[int]) -> bool:
    return max(lengths) <= degree * cost.capacity_tokens


def _add_padded(totals: WayTotals, lengths: Sequence[int], cost: CostModel, num_ranks: int) -> None:
    """Samples sorted by length, as `group_by_length` does, dealt to the ranks in blocks that fit when padded."""
    ordered = sorted(lengths, reverse=True)
    position, step_s = 0, 0.0
    while position < len(ordered):
        longest = ordered[position]
        rows = max(1, min(cost.capacity_tokens // longest, math.ceil((len(ordered) - position) / num_ranks)))
        block = ordered[position : position + rows * num_ranks]
        busy = [cost.seconds([longest] * len(block[rank::num_ranks]), 1) for rank in range(num_ranks)]
        step_s += max(busy)
        totals.idle_s += sum(max(busy) - seconds for seconds in busy)
        totals.num_micro_batches += 1
        position += len(block)
    totals.seconds.append(step_s)
    totals.rank_s += step_s * num_ranks
