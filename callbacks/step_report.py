"""StepReportCallback: the base of callbacks that look at how a planned step went."""

from __future__ import annotations

from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_hetero.costs import CostModel
from hf_hetero.plan import StepReport


class StepReportCallback(TrainerCallback):
    """A `TrainerCallback` with three events more. It looks and writes down; it never changes what is trained."""

    def on_step_report(self, args: TrainingArguments, state: TrainerState, report: StepReport) -> None:
        """Called on every rank after the backward pass of each step."""

    def metrics(self) -> dict[str, float]:
        """Numbers to add to the trainer's next log, since the last one."""
        return {}

    def recalibrated(self, cost: CostModel) -> CostModel | None:
        """A better cost model for the plans to come, or None. Asked after each step."""
        return None
