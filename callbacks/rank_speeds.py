"""`RankSpeedsCallback` learns which ranks are slower than the others, so that plans give them less to do."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import replace
from pathlib import Path

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_hetero.callbacks.slowness import rank_speeds, timed_groups, with_speeds
from hf_hetero.callbacks.step_report import StepReportCallback
from hf_hetero.costs import CostModel
from hf_hetero.plan import StepReport

logger = logging.getLogger(__name__)

UNEVEN_COST_MODEL = "hetero_uneven_cost_model.json"
"""The cost model with the speeds that ranks have shown, in the output folder."""


class RankSpeedsCallback(StepReportCallback):
    """`RankSpeedsCallback` writes a cost model that knows slow ranks, and has the run plan by it.

    Every so many steps each rank's measured seconds are compared with what the cost model charges; a rank that computes
    slower than the others, or is as fast again, gets another share of the full speed (`CostModel.rank_speeds`). The
    cost model with these is written into the output folder, for the next run; this run's plans to come are made by it,
    unless `adopt` is False. As any other plan, they cannot change what is learned: a step has the samples that it has,
    and the same sum over them is its gradient, whoever computes which of them.

    Where sharded weights have all ranks wait in every layer, nobody can tell who is slow: nothing is said, or changed.

    Args:
        every_steps: look after as many steps, and at as many.
        skip_steps: first steps to ignore, when kernels and memory are still warming up.
        least_change: what a rank must be off by, as a share, before its speed is changed.
        adopt: whether this run plans by the speeds, too.
    """

    def __init__(
        self, every_steps: int = 20, skip_steps: int = 3, least_change: float = 0.1, adopt: bool = True
    ) -> None:
        self._every_steps, self._skip_steps = every_steps, skip_steps
        self._least_change, self._adopt = least_change, adopt
        self._reports: deque[StepReport] = deque(maxlen=every_steps)
        self._num_since = -skip_steps
        self._file: Path | None = None
        self._offered: CostModel | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Begin anew: what another run has shown is in its cost model."""
        self._reports.clear()
        self._num_since, self._offered = -self._skip_steps, None

    def on_step_report(self, args: TrainingArguments, state: TrainerState, report: StepReport) -> None:
        """Keep the step for the next look."""
        self._file = Path(args.output_dir or ".") / UNEVEN_COST_MODEL if state.is_world_process_zero else None
        self._num_since += 1
        if self._num_since > 0:
            self._reports.append(report)

    def recalibrated(self, cost: CostModel) -> CostModel | None:
        """Return the cost model with other speeds once enough steps were reported, if a rank has shown another one."""
        if self._num_since < self._every_steps or not self._reports:
            return None
        reports, self._num_since = list(self._reports), 0
        self._reports.clear()
        speeds = rank_speeds(timed_groups(cost, reports), reports[-1].plan.num_ranks)
        found = cost if speeds is None else with_speeds(cost, speeds, self._least_change)
        if found == cost or found == self._offered:
            return None
        self._offered = found
        # by its own word the file's seconds are no better known than before: a run from it refits an estimate
        self._say(replace(found, provenance=cost.provenance), reports)
        return found if self._adopt else None

    def _say(self, found: CostModel, reports: list[StepReport]) -> None:
        """Write the file and log the speeds, on the first rank."""
        if self._file is None:
            return
        speeds = ", ".join(f"rank {rank}: {speed:g}" for rank, speed in sorted(found.rank_speeds.items())) or "all 1"
        what = "Plans to come are made by them" if self._adopt else "This run does not plan by them"
        try:
            found.save(self._file)
            where = f"HeteroConfig(cost_model={str(self._file)!r}) has another run begin with them"
        except OSError as error:  # a missing file costs the next run a few steps, and ends none
            where = f"{self._file} cannot be written: {error}"
        logger.warning(
            "Speeds of ranks, by steps %d to %d: %s. %s; %s.",
            reports[0].step,
            reports[-1].step,
            speeds,
            what,
            where,
        )
