"""What one degree for the whole run would have cost, predicted by the cost model that the run was planned by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hf_hetero.costs import CostModel
from hf_hetero.errors import HeteroError
from hf_hetero.plan import Plan
from hf_hetero.planner import Planner
from hf_hetero.report.records import Record, priced
from hf_hetero.report.run import Run

MOST_SAMPLES = 50_000
"""Samples that are planned anew for each degree: a few seconds of work."""
MOST_STEPS = 50


@dataclass(frozen=True, slots=True)
class StaticRuns:
    """`StaticRuns` are the same steps under one degree each, and as they were planned; all predicted by one cost model.

    Args:
        num_steps: that were looked at, evenly over the run.
        by_degree: predicted seconds of these steps at each degree that holds the longest sample of the run.
        planned_s: predicted seconds of these steps as they were planned.
        measured_s: seconds that their passes took.
        model: which cost model, in words.
    """

    num_steps: int
    by_degree: Mapping[int, float]
    planned_s: float
    measured_s: float
    model: str

    @property
    def best(self) -> int:
        """Return the degree of the fastest static run."""
        return min(self.by_degree, key=lambda degree: self.by_degree[degree])

    @property
    def speedup(self) -> float:
        """Return how many times as long the fastest static run would have taken."""
        return self.by_degree[self.best] / self.planned_s if self.planned_s > 0 else 1.0


def static_runs(run: Run) -> StaticRuns | None:
    """Predict static runs; None where nobody knows the cost model, or it does not know the plans.

    Such a run packs as well as it can (`Planner.static`), and its degree must hold the longest sample of the run.
    """
    cost, num_ranks = run.cost_model, run.rows[0].num_ranks
    if cost is None or any(row.num_ranks != num_ranks for row in run.rows):
        return None
    records = [run.record_of(step) for step in spread_steps(run)]
    plans = [Plan.from_dict(record["plan"]) for record in records]
    if not all(knows(cost, plan) for plan in plans):
        return None
    try:
        planner = Planner(cost, num_ranks)
        longest = max(max(priced(record)) for record in records)
        held = [d for d in planner.degrees if max(run.longest, longest) <= d * cost.leanest.capacity_tokens]
        by_degree = {degree: _seconds(planner, records, degree) for degree in held}
    except HeteroError:
        return None
    if not by_degree:
        return None
    return StaticRuns(
        num_steps=len(records),
        by_degree=by_degree,
        planned_s=sum(cost.plan_seconds(plan, priced(r)) for plan, r in zip(plans, records, strict=True)),
        measured_s=sum(record["seconds"] for record in records),
        model=model_words(cost),
    )


def spread_steps(run: Run) -> list[int]:
    """Choose steps evenly over the run, as few as their samples ask for."""
    samples = max(row.num_samples for row in run.rows)
    most = max(1, min(MOST_STEPS, MOST_SAMPLES // max(samples, 1), len(run.rows)))
    return [run.rows[(2 * k + 1) * len(run.rows) // (2 * most)].step for k in range(most)]


def knows(cost: CostModel, plan: Plan) -> bool:
    """Tell whether a cost model can predict all groups of a plan."""
    degrees = {1, *cost.all_to_all_bytes_per_s}
    known_by = {"ulysses_ring": cost.network_bytes_per_s, "token_ring": cost.query_bytes_per_token}
    unknown = {method for method, number in known_by.items() if number is None}
    return all(
        g.degree in degrees and g.activations in cost.by_activations and (g.degree == 1 or g.method not in unknown)
        for g in plan.groups
    )


def model_words(cost: CostModel) -> str:
    """Name a cost model, and say where its seconds come from."""
    name, said = cost.name or "unnamed", cost.provenance
    return said if said and said.startswith(name) else f"{name}, {said}" if said else name  # not "estimate, estimated"


def _seconds(planner: Planner, records: list[Record], degree: int) -> float:
    return sum(planner.static(priced(record), degree).seconds for record in records)
