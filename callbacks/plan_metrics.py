"""PlanMetricsCallback: one readable line a step, numbers for the trainer's log, a file of plans, a summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_hetero.callbacks.step_report import StepReportCallback
from hf_hetero.plan import StepReport, describe_degrees

LATE_S = 0.1  # a shorter wait is not worth a word


class PlanMetricsCallback(StepReportCallback):
    """Says what each step did: degrees of its groups, planned and measured seconds, tokens a second, idle share.

    Args:
        lines: print a line a step on rank 0.
        record: keep each step's lengths, plan and times in `plans.jsonl` under the output folder.
    """

    def __init__(self, lines: bool = False, record: bool = False) -> None:
        self._lines, self._record = lines, record
        self._since_log: list[StepReport] = []
        self._totals = _Totals()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start a new record, unless a checkpoint is resumed."""
        self._since_log, self._totals = [], _Totals()
        if self._record and state.is_world_process_zero and state.global_step == 0:
            record_path(args).unlink(missing_ok=True)

    def on_step_report(self, args: TrainingArguments, state: TrainerState, report: StepReport) -> None:
        """Print, record, and keep for the next log."""
        self._since_log.append(report)
        self._totals.add(report)
        if not state.is_world_process_zero:
            return
        if self._lines:
            tqdm.write(step_line(report))
        if self._record:
            path = record_path(args)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(to_record(report)) + "\n")

    def metrics(self) -> dict[str, float]:
        """Means over the steps since the last log, under `hetero/`."""
        reports, self._since_log = self._since_log, []
        if not reports:
            return {}
        seconds = sum(r.seconds + r.wait_s for r in reports)
        idle = [r.idle_share for r in reports if r.idle_share is not None]
        load = [layer for r in reports for layer in r.expert_load]
        return {
            "hetero/tokens_per_s": sum(r.num_tokens for r in reports) / seconds if seconds > 0 else 0.0,
            "hetero/step_s": seconds / len(reports),
            "hetero/planned_s": sum(r.plan.seconds for r in reports) / len(reports),
            **({"hetero/idle_share": sum(idle) / len(idle)} if idle else {}),
            **({"hetero/expert_load": sum(load) / len(load), "hetero/expert_load_worst": max(load)} if load else {}),
            "hetero/micro_batches": sum(len(r.plan.micro_batches) for r in reports) / len(reports),
            "hetero/wait_s": sum(r.wait_s for r in reports) / len(reports),
        }

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print what the run did as a whole."""
        if self._lines and state.is_world_process_zero and self._totals.num_steps:
            tqdm.write(self._totals.summary())


def record_path(args: TrainingArguments) -> Path:
    """Where `record=True` keeps its lines."""
    return Path(args.output_dir or ".") / "plans.jsonl"


def step_line(report: StepReport) -> str:
    """One step in one line; a plan that was late is said."""
    late = f"  waited {report.plan_wait_s:.2f} s for its plan" if report.plan_wait_s >= LATE_S else ""
    idle = "" if report.idle_share is None else f"  idle {report.idle_share:4.0%}"
    return (
        f"step {report.step:>4}  {describe_degrees(report.plan):<28}  planned {report.plan.seconds:7.3f} s  "
        f"measured {report.seconds:7.3f} s  {report.tokens_per_s:9,.0f} tokens/s{idle}{late}"
    )


def to_record(report: StepReport) -> dict[str, Any]:
    """A step as one JSON object: `step`, `lengths`, `plan` (hf-hetero-plan/1), `seconds`, `busy_s`."""
    return {
        "step": report.step,
        "lengths": list(report.lengths),
        "plan": report.plan.to_dict(),
        "seconds": report.seconds,
        "busy_s": [list(ranks) for ranks in report.busy_s],
        "wait_s": report.wait_s,
        "is_lockstep": report.is_lockstep,
    }


class _Totals:
    """Sums over a run."""

    def __init__(self) -> None:
        self.num_steps = self.num_tokens = self.num_micro_batches = 0
        self.seconds = self.planned_s = self.planning_s = self.wait_s = self.idle_share = 0.0
        self.is_lockstep = False
        self.degrees: dict[int, int] = {}

    def add(self, report: StepReport) -> None:
        self.num_steps += 1
        self.num_tokens += report.num_tokens
        self.num_micro_batches += len(report.plan.micro_batches)
        self.seconds += report.seconds + report.wait_s
        self.planned_s += report.plan.seconds
        self.planning_s += report.plan.planning_s
        self.wait_s += report.wait_s
        self.idle_share += report.idle_share or 0.0
        self.is_lockstep = report.is_lockstep
        for group in report.plan.groups:
            self.degrees[group.degree] = self.degrees.get(group.degree, 0) + len(group.samples)

    def summary(self) -> str:
        samples = sum(self.degrees.values())
        shares = ", ".join(f"{self.degrees[d] / samples:.0%} at degree {d}" for d in sorted(self.degrees))
        idle = "" if self.is_lockstep else f"idle {self.idle_share / self.num_steps:.0%}, "
        return (
            f"{self.num_steps} steps, {samples:,} samples, {self.num_tokens:,} tokens in {self.seconds:.1f} s: "
            f"{self.num_tokens / self.seconds:,.0f} tokens/s\n"
            f"samples: {shares}\n"
            f"{self.num_micro_batches / self.num_steps:.1f} micro-batches a step, "
            f"{idle}"
            f"planning {1000 * self.planning_s / self.num_steps:.1f} ms a step in the background, "
            f"waited {self.wait_s:.2f} s for plans and data"
        )
