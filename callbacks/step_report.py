"""`StepReportCallback` is the base of callbacks that look at how a planned step went."""

from __future__ import annotations

from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_hetero.config import HeteroConfig
from hf_hetero.costs import CostModel
from hf_hetero.plan import StepReport


class StepReportCallback(TrainerCallback):
    """`StepReportCallback` has four events more than `TrainerCallback`; none of them may change what is trained."""

    def on_cost_model(
        self, args: TrainingArguments, state: TrainerState, hetero: HeteroConfig, cost_model: CostModel
    ) -> None:
        """Look at what plans are made by; the trainer calls this on every rank before training, and after a refit."""

    def on_step_report(self, args: TrainingArguments, state: TrainerState, report: StepReport) -> None:
        """Look at a step; the trainer calls this on every rank after the backward pass of each one."""

    def metrics(self) -> dict[str, float]:
        """Return numbers to add to the trainer's next log, since the last one."""
        return {}

    def recalibrated(self, cost: CostModel) -> CostModel | None:
        """Return a better cost model for the plans to come, or None; the trainer asks after each step."""
        return None
