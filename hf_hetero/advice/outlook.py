"""An outlook predicts a run: the same steps planned anew each, and under the best single degree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_hetero.costs import CostModel
from hf_hetero.errors import InfeasibleBatch
from hf_hetero.planner import Planner


@dataclass(frozen=True, slots=True)
class Outlook:
    """An `Outlook` is what steps come to.

    Args:
        num_tokens: of all steps.
        adaptive_s: seconds of all steps, planned.
        bound_s: seconds below which no plan is.
        static_s: the same at each degree that holds the context, all the time.
    """

    num_tokens: int
    adaptive_s: float
    bound_s: float
    static_s: dict[int, float]

    @property
    def tokens_per_s(self) -> float:
        """Return the tokens a second of all GPUs, planned."""
        return self.num_tokens / self.adaptive_s

    @property
    def best_degree(self) -> int:
        """Return the best degree for a whole run."""
        return min(self.static_s, key=lambda degree: self.static_s[degree])

    @property
    def static_tokens_per_s(self) -> float:
        """Return the tokens a second of all GPUs at the best degree for a whole run."""
        return self.num_tokens / self.static_s[self.best_degree]


def longest_by_degree(cost: CostModel, num_ranks: int) -> dict[str, dict[int, int]]:
    """Return the tokens of the longest sample that fits: what groups do (`Group.activations`, or "") -> degree."""
    return {
        doing or "": {degree: degree * way.capacity_tokens for degree in cost.degrees(num_ranks)}
        for doing, way in cost.by_activations.items()
    }


def longest(cost: CostModel, num_ranks: int) -> int:
    """Return the tokens of the longest sample that fits anywhere."""
    return max(max(by_degree.values()) for by_degree in longest_by_degree(cost, num_ranks).values())


def outlook(batches: Sequence[Sequence[int]], planner: Planner, context_tokens: int) -> Outlook:
    """Predict steps.

    Args:
        batches: lengths of the samples of each step.
        planner: for the ranks of the run.
        context_tokens: the longest sample of the run, which its one degree must hold whether or not it comes.

    Raises:
        InfeasibleBatch: no degree holds the context.
    """
    holding = _holding(planner, context_tokens)
    plans = [planner.plan(lengths) for lengths in batches]
    static = [planner.static_seconds(lengths) for lengths in batches]
    return Outlook(
        num_tokens=sum(map(sum, batches)),
        adaptive_s=sum(plan.seconds for plan in plans),
        bound_s=sum(plan.lower_bound_s for plan in plans),
        static_s={degree: sum(seconds[degree] for seconds in static) for degree in holding},
    )


def planned_speed(batches: Sequence[Sequence[int]], planner: Planner, context_tokens: int) -> float:
    """Return the tokens a second of steps that are planned: those of their outlook, without all that it compares.

    Args:
        batches, planner, context_tokens: as `outlook`.

    Raises:
        InfeasibleBatch: as `outlook`.
    """
    _holding(planner, context_tokens)
    return sum(map(sum, batches)) / sum(planner.plan(lengths).seconds for lengths in batches)


def _holding(planner: Planner, context_tokens: int) -> list[int]:
    """List the degrees that hold the longest sample of a run.

    Raises:
        InfeasibleBatch: none does.
    """
    holding = [d for d in planner.degrees if d * planner.cost_model.leanest.capacity_tokens >= context_tokens]
    if not holding:
        most = longest(planner.cost_model, planner.num_ranks)
        raise InfeasibleBatch(f"Samples have up to {context_tokens:,} tokens; the longest that fits has {most:,}.")
    return holding
