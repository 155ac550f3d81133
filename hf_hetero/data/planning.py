"""This module says how a run plans its steps: with which planner, how far ahead, under which limits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch.distributed as dist

from hf_hetero.collators.limits import Limits
from hf_hetero.config import HeteroConfig
from hf_hetero.costs import CostModel
from hf_hetero.data.plan_sources import PlansOfThisProcess, PlanSource, planned_elsewhere
from hf_hetero.planner import Backend, Planner, Solver
from hf_hetero.planner.improve.program import is_installed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Planning:
    """`Planning` says how a run plans its steps.

    Args:
        source: where plans come from.
        num_ahead: plans kept ready.
        length_column: column with each row's tokens.
        most_tokens: of a sample; None: any number.
        longer: what to do with longer ones: "error", "truncate" or "split".
        limits: what the model has room for.
        weight_column: what weighs the loss, by which the data are known again when a run is resumed; None: nothing.
        control: group that carries the plans; None for a single process.
    """

    source: PlanSource
    num_ahead: int
    length_column: str
    control: dist.ProcessGroup | None
    most_tokens: int | None = None
    longer: str = "error"
    limits: Limits = field(default_factory=Limits)
    weight_column: str | None = None


def planning_of(
    hetero: HeteroConfig, source: PlanSource, control: dist.ProcessGroup | None, limits: Limits
) -> Planning:
    """Return how to plan as the user's settings say, for a model with such limits."""
    return Planning(
        source,
        num_ahead=hetero.plan_ahead_steps,
        length_column=hetero.length_column,
        control=control,
        most_tokens=hetero.max_sample_tokens,
        longer=hetero.longer_samples,
        limits=limits,
        weight_column=hetero.weight_column,
    )


@dataclass(frozen=True, slots=True)
class Planners:
    """`Planners` makes planners as the user's settings say.

    Args:
        hetero: settings.
        num_ranks: of the run.
        cost_model: asked anew for each plan, for callbacks may refit it.
        methods: exchanges that the attention kernel allows.
    """

    hetero: HeteroConfig
    num_ranks: int
    cost_model: Callable[[], CostModel]
    methods: Sequence[str]

    def planner(self, solver: str | None = None) -> Planner:
        """Return the planner for the cost model as it is now."""
        return Planner(
            self.cost_model(),
            num_ranks=self.num_ranks,
            solver=cast("Solver", solver or self.hetero.solver),
            mip_backend=cast("Backend", self.hetero.mip_backend),
            methods=list(self.methods),
        )

    def for_training(self, reproducible: bool) -> PlanSource:
        """Return a source of plans from processes of their own.

        Args:
            reproducible: do without what is not the same in two runs: whether an improved plan is ready in time.
        """
        # "fast" asks for no integer program, and "mip" has solved its programs when it plans
        improves = self.hetero.solver == "auto" and not reproducible
        if improves and not is_installed():
            logger.warning("The package 'mip' is not installed: plans are not improved while there is time.")
            improves = False
        return planned_elsewhere(self.planner, improves, self.hetero.planning_timeout_s)

    def for_evaluation(self) -> PlanSource:
        """Return a source of plans from this process."""
        # a forward pass leaves a thread the processor, and processes would start anew for each evaluation
        return PlansOfThisProcess(lambda: self.planner("fast"))
